"""Contract of a stage for the programs, which know it by name: how it is built, checked, fed and scored.

`Stage` (in `iccld.stages.base`) is a stage that is built, for the loop; a `StageKind` is its line in the table.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from iccld.models.iccld import ICCLD
from iccld.models.model_card import ModelStage
from iccld.models.settings import ModelConfig
from iccld.stages.base import Stage
from iccld.stages.predictor import Predictor, predictor_of
from iccld.stages.settings import InferenceConfig, ViewCacheConfig
from iccld.stages.signs import LONGER_WARM_START, Sign
from iccld.strides import LATENT_STRIDE

SectionT = TypeVar("SectionT", covariant=True)
Score = Callable[[Sequence[Predictor]], Any]
"""Scores predictors on the validation set, one for each noise seed, as JSON."""


@dataclass(frozen=True)
class StageSettings(Generic[SectionT]):
    """Settings of a run that a stage sees: `own`, the section of its name, and those of all stages.

    `is_filled`: a checkpoint will give all weights, so the stage neither loads nor downloads any.
    """

    own: SectionT
    model: ModelConfig
    seed: int
    num_classes: int
    crop_size: Sequence[int]
    initial_model: str = ""
    is_filled: bool = False

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Return `(C, h, w)` of a crop's latent."""
        height, width = (-(-side // LATENT_STRIDE) for side in self.crop_size)
        return self.model.latent_channels, height, width

    def new_model(self, *, with_denoiser: bool) -> ICCLD:
        """Return the model of the settings, with fresh weights."""
        return ICCLD(config=self.model, num_classes=self.num_classes, with_denoiser=with_denoiser)


class StageKind(ABC, Generic[SectionT]):
    """A stage as the programs see it. It must define `name`, `saved_as` and `build`; the rest has usual answers."""

    name: str
    """Name of its section in the settings, and of its folder in a run directory."""
    previous: str = ""
    """The stage whose teacher it starts from; empty for none."""
    saved_as: ModelStage
    """Stage of training that the cards of its models name."""
    free_settings: tuple[str, ...] = ()
    """Settings of its section, besides those of every stage, that may change between two attempts at one run."""
    settings_of_it_alone: tuple[str, ...] = ()
    """Beginnings of settings outside its section that change nothing in a run without this stage."""
    settings_of_no_view: tuple[str, ...] = ()
    """Beginnings of settings that nothing in its cache depends on; new ones are taken to matter."""

    @abstractmethod
    def build(self, settings: StageSettings[SectionT], previous: ICCLD | None, *, device: torch.device) -> Stage:
        """Return the stage with its model on the device.

        previous: the teacher that the stage before left; None if there is no such stage, or if the stage is built to be
        measured and not to learn, from fresh weights. Raises ValueError for settings that do not fit.
        """

    def check(self, settings: StageSettings[SectionT], *, device: torch.device, is_sharded: bool) -> None:
        """Refuse settings that would fail this stage, before time is spent on an earlier one. Raises ValueError.

        is_sharded: ranks hold shards of what trains.
        """

    def reads_target(self, settings: StageSettings[SectionT]) -> bool:
        """Tell whether its batches hold target images."""
        return True

    def reads_target_labels(self, settings: StageSettings[SectionT]) -> bool:
        """Tell whether its batches hold the target's true labels, too."""
        return False

    def noise(self, settings: StageSettings[SectionT]) -> dict[str, tuple[int, ...]]:
        """Return the shapes, by purpose, of the noise that the stream draws for each sample of a batch."""
        return {}

    def cache(self, settings: StageSettings[SectionT]) -> ViewCacheConfig | None:
        """Return the settings of the cache of its views, where it has one (`Stage.view_cache`)."""
        return None

    def averaged(self, model: ICCLD) -> nn.Module:
        """Return the part of one of its models that is averaged in training."""
        return model

    def num_steps(self, inference: InferenceConfig) -> list[int]:
        """Return the numbers of denoising steps that its models are scored with."""
        return [0]

    def shown_steps(self, inference: InferenceConfig) -> int:
        """Return the number of denoising steps of its main score, and of a grid's pictures: the first that denoises."""
        return next(filter(None, self.num_steps(inference)), 0)

    def fewest_steps(self, inference: InferenceConfig) -> int:
        """Return the fewest denoising steps that its models are scored with, 0 if none denoises: for a quick look."""
        return min(filter(None, self.num_steps(inference)), default=0)

    def predictor(
        self, model: ICCLD, inference: InferenceConfig, *, seed: int, num_steps: int, noise_seed: int = 0
    ) -> Predictor:
        """Return how one of its models predicts."""
        return predictor_of(model, inference, seed=seed, num_steps=num_steps, noise_seed=noise_seed)

    def scores(self, model: ICCLD, inference: InferenceConfig, *, seed: int, score: Score) -> dict[str, Any]:
        """Return the scores of one of its models: under its name, and those of controls under `NAME_control`."""
        return {self.name: score([self.predictor(model, inference, seed=seed, num_steps=0)])}

    def main_score(self, inference: InferenceConfig) -> str:
        """Return the name, in a table of scores, of the one that runs are compared by."""
        return self.name

    def signs(self, recent: Sequence[Mapping[str, Any]], settings: StageSettings[SectionT]) -> list[Sign]:
        """Return the signs of failure that only this stage has, in its last logged lines."""
        return []

    def class_remedies(self, settings: StageSettings[SectionT]) -> list[str]:
        """Return what may keep a class in the pseudo-labels, as settings to try."""
        return [LONGER_WARM_START]
