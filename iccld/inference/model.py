"""`ICCLD` for those who use it: the model of `iccld.models`, with predictions, and with the hub's save, load and push.

from iccld import ICCLD
model = ICCLD.from_pretrained("runs/a")
result = model.predict("street.jpg")
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack, overload

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from PIL import Image
from torch import Tensor

from iccld.evaluation import windowed
from iccld.inference.images import Images, is_one, read_images
from iccld.inference.prediction import Prediction, segment
from iccld.inference.scores import scores_of
from iccld.inference.source import load_model
from iccld.models import iccld as figure
from iccld.models.model_card import without_paths
from iccld.models.readme import describe
from iccld.models.settings import AttentionBackend
from iccld.settings import EvaluationConfig
from iccld.stages.settings import InferenceConfig
from iccld.stages.table import stage_of
from iccld.strides import LATENT_STRIDE

PRECISIONS = ("fp32", "bf16")
SEED = 0
ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def moved(model: ModelT, device: torch.device | str) -> ModelT:
    """Move a model to a device. Raises ValueError if there is no such device, or no room on it."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        why = str(error).partition("\n")[0]
        raise ValueError(f"device={device} cannot be used ({why}); use cpu, or a device that is there.") from error


class PredictOptions(TypedDict, total=False):
    """Options of `ICCLD.predict`, which explains them, for those who check types."""

    num_steps: int
    seeds: int
    size: Sequence[int]
    sliding_window: bool
    device: torch.device | str | None
    precision: str


class ICCLD(figure.ICCLD, ModelHubMixin, library_name="iccld", pipeline_tag="image-segmentation"):
    """A trained model: images to labels, probabilities and uncertainty (`predict`), or to logits (`forward`)."""

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        source: str | Path,
        *,
        weights: str = "teacher",
        revision: str | None = None,
        num_classes: int | None = None,
        with_denoiser: bool | None = None,
        attention: AttentionBackend | None = None,
    ) -> Self:
        """Load a model folder, a run's last finished stage, or `owner/name` from the hub, in eval mode, on the CPU.

        Of the hub two files are fetched, the card and the weights; no code is, and nothing of either runs. weights:
        `teacher`, `student` or `best`, of a run. revision: a branch, tag or commit of the hub. The others, and what is
        checked before anything is built: see `iccld.models.iccld.ICCLD.from_pretrained`. Raises ValueError.
        """
        options: dict[str, Any] = {"with_denoiser": with_denoiser, "attention": attention}
        load = partial(super().from_pretrained, num_classes=num_classes, **options)
        model = load_model(source, load, weights=weights, revision=revision)
        assert model.card is not None
        if scores := scores_of(Path(source), model.card):
            model.card.origin["scores"] = scores
        return model

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        folder: str | Path,
        *,
        class_names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        origin: dict[str, Any] | None = None,
        **of_the_hub: Any,
    ) -> None:
        """Write model.safetensors, config.json and README.md; names, palette and origin are the card's unless given.

        Paths of this machine in the origin become the names of what they lead to: a copy may go anywhere.
        `push_to_hub` (huggingface_hub's) uploads the same three files. Raises ValueError.
        """
        if wrong := [name for name, value in of_the_hub.items() if value and name != "config"]:
            raise ValueError(f"save_pretrained: {wrong[0]} has no use here; save, and then call push_to_hub.")
        card = self.card
        if card is None and (class_names is None or palette is None):
            raise ValueError("save_pretrained: this model was not loaded; give class_names and palette.")
        super().save_pretrained(
            folder,
            class_names=class_names if card is None or class_names is not None else card.class_names,  # pyright: ignore[reportArgumentType]
            palette=palette if card is None or palette is not None else card.palette,  # pyright: ignore[reportArgumentType]
            origin=without_paths((origin or {}) if card is None or origin is not None else card.origin),
        )

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """The text of README.md, as huggingface_hub's own class. Raises ValueError for a model that was not loaded."""
        return ModelCard(describe(self._own_card()))

    @overload
    def predict(
        self, images: str | Path | Image.Image | np.ndarray, **options: Unpack[PredictOptions]
    ) -> Prediction: ...
    @overload
    def predict(self, images: Sequence[Images], **options: Unpack[PredictOptions]) -> list[Prediction]: ...
    @overload
    def predict(self, images: Tensor, **options: Unpack[PredictOptions]) -> Prediction | list[Prediction]: ...
    def predict(  # pyright: ignore[reportInconsistentOverload]
        self,
        images: Images | Sequence[Images],
        *,
        num_steps: int = 0,
        seeds: int = 1,
        size: Sequence[int] = (),
        sliding_window: bool = False,
        device: torch.device | str | None = None,
        precision: str = "fp32",
    ) -> Prediction | list[Prediction]:
        """Segment one image, or several: a list, or a tensor with a batch dimension, gives a list of results.

        images: paths; PIL images; arrays (H, W, 3) or tensors (3, H, W) or (B, 3, H, W), uint8 or float in [0, 1].
        num_steps: denoising steps; 0 is the decoder alone. seeds: the noises whose probabilities are averaged.
        size: (height, width) that images are resized to for the model; results keep the image's size.
        sliding_window: overlapping windows of 512x512 pixels, averaged. device: the model is moved there; None: it
        stays where it is. precision: `fp32` or `bf16`. Raises ValueError.
        """
        if device is not None:
            moved(self, device)
        segment_one = self.segmenter(
            num_steps=num_steps, seeds=seeds, size=size, sliding_window=sliding_window, precision=precision
        )
        results = [segment_one(pixels, number).on_cpu() for pixels, number in read_images(images)]
        return results[0] if is_one(images) else results

    def segmenter(
        self,
        *,
        num_steps: int = 0,
        seeds: int = 1,
        size: Sequence[int] = (),
        sliding_window: bool = False,
        precision: str = "fp32",
        inference: InferenceConfig | None = None,
    ) -> Callable[[np.ndarray, int], Prediction]:
        """`predict` of one image after the other: pixels `(H, W, 3)` and the number that keys the noise to a result.

        Options are those of `predict`; `inference` says what else is averaged. Raises ValueError if they do not fit the
        model.
        """
        card = self._own_card()
        inference = inference or InferenceConfig()
        self._check(num_steps=num_steps, seeds=seeds, size=size, precision=precision)
        if self.deterministic:
            _refuse_noise(inference)
        config = EvaluationConfig(image_size=list(size), sliding_window=sliding_window)
        predictor = stage_of(self).predictor
        predictors = [
            windowed(predictor(self, inference, seed=SEED, num_steps=num_steps, noise_seed=noise_seed), config)
            for noise_seed in range(seeds)
        ]
        device = self.alpha_bar.device
        colours = [(red, green, blue) for red, green, blue in card.palette]
        run = partial(segment, predictors=predictors, names=card.class_names, colours=colours, device=device)

        def segment_one(pixels: np.ndarray, number: int) -> Prediction:
            was_training = self.training
            self.eval()
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    return run(pixels, number)
            finally:
                self.train(was_training)

        return segment_one

    def _own_card(self) -> figure.ModelCard:
        if self.card is None:
            raise ValueError("this model has no card, which says its classes; load it with ICCLD.from_pretrained.")
        return self.card

    def _check(self, *, num_steps: int, seeds: int, size: Sequence[int], precision: str) -> None:
        for name, value in (("num_steps", num_steps), ("seeds", seeds)):
            if not isinstance(value, int | np.integer):
                raise ValueError(f"{name}={value!r} must be a whole number.")
        if not 0 <= num_steps <= 1000:
            raise ValueError(f"num_steps={num_steps} must be between 0 (the decoder alone) and 1000.")
        if num_steps:
            self._trained_denoiser()
        if seeds < 1 or (seeds > 1 and (not num_steps or self.deterministic)):
            why = "this model never saw noise" if self.deterministic else "without denoising, no noise is drawn"
            raise ValueError(f"seeds={seeds} must be {'1: ' + why if seeds > 1 else 'at least 1'}; use seeds=1.")
        are_pixels = isinstance(size, Sequence) and all(isinstance(side, int | np.integer) for side in size)
        if not are_pixels or len(size) not in (0, 2) or (size and min(size) < LATENT_STRIDE):
            raise ValueError(f"size={size!r} must be (height, width), at least {LATENT_STRIDE} pixels each, or empty.")
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}.")


def _refuse_noise(inference: InferenceConfig) -> None:
    """Refuse settings that change nothing for a model that never saw noise. Raises ValueError."""
    usual, names = InferenceConfig(), ("solver", "start", "num_averaged")
    if given := [name for name in names if getattr(inference, name) != getattr(usual, name)]:
        raise ValueError(f"{', '.join(given)} would change nothing: this model never saw noise; leave it out.")
