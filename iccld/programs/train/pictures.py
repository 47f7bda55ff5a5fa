"""Draws, every so many steps, the same few target crops: image, pseudo-label, prediction.

    run_dir/pictures/stage1/step_00002000.png

The crops are the stream's first samples. Rank 0 draws. What fails on any rank is said once, and ends no training. One
thing does: a rank that fails while it exchanges weights, since the others wait for it there; so each rank first builds
the stage that takes them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iccld.batch_layout import BatchLayout
from iccld.config import Config, stage_settings
from iccld.durable import make_folder
from iccld.eager import without_compiled_code
from iccld.evaluation import Predict, whole_image
from iccld.inference.pictures import colourise, comparison_picture, legend, save_picture
from iccld.labels import ClassSet
from iccld.outcome import say
from iccld.programs.run.building import build_stream, gathered, stage_for_whole_weights
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure.metrics import MetricsLogger
from iccld.runtime.measure.telemetry import one_line
from iccld.runtime.ranks import is_failure
from iccld.stages.base import Stage, to_float
from iccld.stages.table import STAGES

MIN_WIDTH, MAX_WIDTH = 192, 384  # pixels of a crop in a picture
TITLES = ("image", "pseudo-label", "prediction")


class TrainingPictures:
    """The pictures of one stage while it trains."""

    def __init__(
        self, stage: Stage, config: Config, engine: Engine, *, metrics: MetricsLogger, watchdog: Watchdog
    ) -> None:
        self.stage, self.config, self.engine = stage, config, engine
        self.metrics, self.watchdog = metrics, watchdog
        self._folder = Path(config.run_dir) / "pictures" / stage.name
        has_target = STAGES[stage.name].reads_target(stage_settings(stage.name, config))
        self._every = config.metrics.pictures.every if has_target and config.data.target.shards else 0
        self._crops: list[Mapping[str, Any]] = []
        self._has_failed = False

    def is_due(self, step: int) -> bool:
        """Tell whether there is to be one after `step` steps; never if the stage reads no target."""
        return bool(self._every and step and step % self._every == 0)

    def is_owed(self, step: int) -> bool:
        """Tell, on the main rank, whether the one after `step` steps is not there."""
        return self.engine.ranks.is_main and not self._file(step).exists()

    def draw(self, step: int) -> None:
        """Draw and log one on the main rank, while the others wait; none after a failure. Call on every rank."""
        into = self._tried(lambda: stage_for_whole_weights(self.stage, self.config, self.engine))
        stage = gathered(self.stage, into, self.engine) if into else None
        self._tried(lambda: self._draw(stage, step) if self.engine.ranks.is_main and stage else None)

    def _tried(self, action: Callable[[], Stage | None]) -> Stage | None:
        """Return what the action does; None after it, or one before it, has failed on any rank.

        Raises what another rank's end causes.
        """
        if self._has_failed:
            return None
        done, failure = None, ""
        try:
            done = action()
        except Exception as error:  # a picture is no reason not to train
            if is_failure(error):
                raise
            failure = one_line(error)
        said = self.engine.ranks.gather(failure)
        failures = [f"rank {rank}: {why}" for rank, why in enumerate(said) if why]
        self._has_failed = bool(failures)
        if failures and self.engine.ranks.is_main:
            say(f"pictures: {failures[0]}; training goes on without them")
        return None if failures else done

    def _file(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}.png"

    def _draw(self, stage: Stage, step: int) -> None:
        self._crops = self._crops or [*self._read()]
        with torch.no_grad(), self.engine.autocast(), without_compiled_code():
            rows = [*self._rows(stage)]
        sheet = drawn(rows, self.config.data.class_set.build())
        make_folder(self._folder, within=Path(self.config.run_dir))
        save_picture(sheet, self._file(step))
        self.metrics.picture("pictures", np.asarray(sheet), step=step)

    def _read(self) -> Iterator[Mapping[str, Any]]:
        """The stream's first samples, one in a batch, read in this process."""
        config = replace(self.config, data=replace(self.config.data, num_workers=0))
        count = config.metrics.pictures.count
        layout = BatchLayout(global_batch_size=count, micro_batch_size=1)
        with closing(build_stream(self.stage.name, config, layout).batches(0)) as batches:
            yield from islice(batches, count)

    def _rows(self, stage: Stage) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
        """Image `(H, W, 3)`, pseudo-label and prediction `(H, W)` of each crop; None where the stage has no labels."""
        kind, inference = STAGES[stage.name], self.config.inference
        fewest = kind.fewest_steps(inference)
        student = stage.assemble_models()["student"]
        predict = kind.predictor(student, inference, seed=self.config.seed, num_steps=fewest)
        for batch in self.engine.prefetch(iter(self._crops)):
            self.watchdog.tick()
            image = batch["target"]["images"][0].permute(1, 2, 0)
            pseudo, prediction = stage.pseudo_labels_of(batch), _predicted(predict, batch["target"])
            yield _on_host(image), None if pseudo is None else _on_host(pseudo[0]), _on_host(prediction)


def drawn(rows: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]], class_set: ClassSet) -> Image.Image:
    """A sheet with a row a crop: image, pseudo-label (if there is one), prediction; the legend of their classes."""
    colour = partial(colourise, palette=class_set.palette)
    titles = [title for title, cell in zip(TITLES, rows[0], strict=True) if cell is not None]
    cells = [
        [_resized(image), *([] if pseudo is None else [colour(pseudo)]), colour(prediction)]
        for image, pseudo, prediction in rows
    ]
    sheet = comparison_picture(cells, titles)
    labels = [labels for _, *of_row in rows for labels in of_row if labels is not None]
    seen = {int(index) for each in labels for index in np.unique(each)}
    keys = legend(class_set.names, class_set.palette, only=seen & set(range(len(class_set.names))))
    whole = Image.new("RGB", (sheet.width + keys.width, max(sheet.height, keys.height)), "white")
    whole.paste(sheet, (0, 0))
    whole.paste(keys, (sheet.width, 0))
    return whole


def _resized(image: np.ndarray) -> np.ndarray:
    """The image, enlarged or reduced to a width that can be looked at; label maps are brought to its size."""
    height, width = image.shape[:2]
    if width <= MAX_WIDTH:
        times = -(-MIN_WIDTH // width)
        return image.repeat(times, axis=0).repeat(times, axis=1)
    size = (MAX_WIDTH, max(1, round(height * MAX_WIDTH / width)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _predicted(predict: Predict, target: Mapping[str, Any]) -> Tensor:
    """Class indices `(H, W)` uint8 of a batch's one image."""
    logits = whole_image(predict, to_float(target["images"]), target["numbers"])
    return logits[0].argmax(dim=0).to(torch.uint8)


def _on_host(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())
