"""A stage's curves for TensorBoard, in `run_dir/tensorboard/STAGE`; only this file knows the package."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iccld.durable import refuse_links
from iccld.extras import remedy
from iccld.outcome import say
from iccld.runtime.measure.telemetry import START_S, Outlet, one_line, within

_other_threads = threading.excepthook


def without_writers(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but for TensorBoard's own, whose failure the next call raises, and is said then."""
    if not type(failure.thread).__module__.startswith("tensorboard."):
        _other_threads(failure)


class TensorBoardRun(Outlet):
    """A writer of TensorBoard's event files, or nothing once it has failed."""

    name = "tensorboard"

    def start(self, run_dir: Path, stage: str, *, step: int) -> None:
        """Begin, or go on after `step` steps; what an earlier attempt wrote beyond them is no longer shown."""

        def start() -> Any:
            folder = run_dir / self.name / stage
            refuse_links(folder, within=run_dir)
            try:
                from torch.utils.tensorboard import SummaryWriter  # 1 s; only where it is used
            except ModuleNotFoundError as error:
                raise RuntimeError(remedy(error)) from error
            threading.excepthook = without_writers
            return SummaryWriter(str(folder), purge_step=step + 1)

        try:
            self._run = within(START_S, start)
        except Exception as error:  # whatever it is, it is no reason not to train
            say(f"{self.name}: it did not start ({one_line(error)}); metrics.jsonl and training go on without it")

    def log(self, facts: Mapping[str, Any], *, step: int) -> None:
        """Add a point to the curve of each number."""
        numbers = {name: value for name, value in facts.items() if type(value) in (int, float) and name != "step"}

        def add(writer: Any) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        self.tell(add)

    def picture(self, name: str, image: np.ndarray, *, step: int) -> None:
        """Add a picture `(H, W, 3)` uint8."""

        def add(writer: Any) -> None:
            writer.add_image(name, image, step, dataformats="HWC")
            writer.flush()

        self.tell(add)

    def finish(self) -> None:
        """Write what is left, and close the file."""
        self.tell(lambda writer: writer.close())
