"""The stage contract: what a trainer needs to know of a stage, and nothing more."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iccld import rng
from iccld.models.iccld import ICCLD
from iccld.uda.ema_profile import EmaProfileConfig, PowerAverages
from iccld.uda.teacher import Teacher


class StageInputs(NamedTuple):
    """What `prepare` hands to the module.

    `denominators` holds what each loss of this micro-batch would be divided by (valid pixels, samples). The trainer
    replaces them by their mean over the micro-batches of the global batch, so that the mean of the micro-batch losses
    is the loss of the global batch, however it is split.
    """

    tensors: dict[str, Tensor]
    denominators: dict[str, Tensor]


class StageOutput(NamedTuple):
    """`losses`: scalars whose sum is minimised.

    `metrics`: `(2,)` pairs (sum, count), reported as sum / count; or `(2, n)` histograms, the second the reference of
    the first, reported as `NAME/distance` and `NAME/lost` (`runtime.metrics.compared`). They are summed over
    micro-batches, ranks and steps.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Stage(ABC):
    """One training stage. It never calls backward, steps an optimiser or saves."""

    name: str
    module: Any
    """What the engine wraps, an `nn.Module`: `forward(StageInputs) -> StageOutput`."""
    student: Any
    """The part of it that is averaged, an `nn.Module`."""
    teacher: Teacher[Any]
    ema_profile: EmaProfileConfig
    profiles: PowerAverages | None = None

    @abstractmethod
    def prepare(self, batch: Mapping[str, Any], step: int) -> StageInputs:
        """Called without gradient: the teacher predicts, images are mixed, noise is drawn."""

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: what trains, at which learning rate."""

    @abstractmethod
    def models(self) -> dict[str, ICCLD]:
        """The models as they are now, under `teacher` and `student`."""

    def parts(self) -> dict[str, nn.Module]:
        """Whose work is told apart in a step, by name."""
        return dict(self.module.named_children())

    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:  # noqa: B027, most stages have nothing to measure
        """Called on one rank after the last step, with the stream's first batches: measure what comes after needs."""

    def start(self) -> None:
        """Called when the engine holds the module: what is averaged from here on is what this rank holds of it."""
        if self.ema_profile.widths:
            self.profiles = PowerAverages(dict(self.student.named_parameters()), self.ema_profile.widths)

    def after_step(self, step: int) -> None:
        """Called after the optimiser's step; `step` were done before it, as `prepare` was told."""
        self.teacher.update(self.student, step)
        if self.profiles is not None:
            self.profiles.update(dict(self.student.named_parameters()), step)

    def state_dict(self) -> dict[str, Tensor]:
        """Whatever changes in training and is not in the engine: the tensors themselves, filled in place on resume."""
        return self.teacher.state_dict() | (self.profiles.state_dict() if self.profiles is not None else {})

    def averages(self) -> dict[nn.Module, tuple[str, ...]]:
        """Modules to be sharded as the trained one is, and their methods that are called like `forward`."""
        return {self.teacher.module: ()}

    def frozen(self) -> list[nn.Module]:
        """What `prepare` calls, each by its own `__call__`, for an engine that compiles."""
        return []

    def replicated(self) -> list[nn.Module]:
        """Parts of `module` that no engine may shard: their parameters are used beside their own forward pass."""
        return []


def decayed_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, learning_rate: float, weight_decay: float, **options: Any
) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: matrices decay; norms, biases and position embeddings do not."""
    trainable = [(name, p) for name, p in parameters if p.requires_grad]
    decayed = [p for name, p in trainable if p.dim() > 1 and "position" not in name]
    plain = [p for name, p in trainable if p.dim() <= 1 or "position" in name]
    groups = [(decayed, weight_decay), (plain, 0.0)]
    return [{"params": p, "lr": learning_rate, "weight_decay": decay, **options} for p, decay in groups if p]


def keyed_noise(domain: Mapping[str, Any], purpose: str, shape: Sequence[int], *, seed: int) -> Tensor:
    """Normal noise of a domain's samples, `(B, *shape)` float32: as the stream has drawn it, or else drawn here."""
    if purpose in domain:
        return domain[purpose]
    device = domain["images"].device
    return rng.normal(tuple(shape), seed=seed, purpose=purpose, numbers=domain["numbers"], device=device)


def to_float(images: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` to float32 in [0, 1]."""
    return images.float().div_(255.0)


def pair(total: Tensor, count: Tensor | float) -> Tensor:
    """A metric's (sum, count), detached, float32."""
    if not isinstance(count, Tensor):
        count = torch.full((), float(count), device=total.device)
    return torch.stack([total.detach().float(), count.detach().float()])
