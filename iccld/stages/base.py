"""The stage contract: what a trainer needs to know of a stage, and nothing more. A third stage is one new file."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iccld.models.iccld import ICCLD


class StageInputs(NamedTuple):
    """What `prepare` hands to the module.

    `denominators` holds what each loss of this micro-batch would be divided by (valid pixels, samples). The trainer
    replaces them by their mean over the micro-batches of the global batch, so that the mean of the micro-batch losses
    is the loss of the global batch, however it is split.
    """

    tensors: dict[str, Tensor]
    denominators: dict[str, Tensor]


class StageOutput(NamedTuple):
    """`losses`: scalars whose sum is minimised. `metrics`: `(2,)` pairs (sum, count), reported as sum / count."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Stage(ABC):
    """One training stage. It never calls backward, steps an optimiser or saves."""

    name: str
    module: Any
    """What the engine wraps, an `nn.Module`: `forward(StageInputs) -> StageOutput`."""

    @abstractmethod
    def prepare(self, batch: Mapping[str, Any], step: int) -> StageInputs:
        """Called without gradient: the teacher predicts, images are mixed, noise is drawn."""

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: what trains, at which learning rate."""

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Called after the optimiser's step `step` (0-based)."""

    @abstractmethod
    def models(self) -> dict[str, ICCLD]:
        """The models as they are now, under `teacher` and `student`."""

    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:  # noqa: B027, most stages have nothing to measure
        """Called on one rank after the last step, with the stream's first batches: measure what comes after needs."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Whatever changes in training and is not in the engine."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def decayed_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, learning_rate: float, weight_decay: float, **options: Any
) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: matrices decay; norms, biases and position embeddings do not."""
    trainable = [(name, p) for name, p in parameters if p.requires_grad]
    decayed = [p for name, p in trainable if p.dim() > 1 and "position" not in name]
    plain = [p for name, p in trainable if p.dim() <= 1 or "position" in name]
    groups = [(decayed, weight_decay), (plain, 0.0)]
    return [{"params": p, "lr": learning_rate, "weight_decay": decay, **options} for p, decay in groups if p]


def to_float(images: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` to float32 in [0, 1]."""
    return images.float().div_(255.0)


def pair(total: Tensor, count: Tensor | float) -> Tensor:
    """A metric's (sum, count), detached, float32."""
    return torch.stack([total.detach().float(), torch.as_tensor(count, device=total.device).detach().float()])
