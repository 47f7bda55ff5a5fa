"""Contract of a built stage: what the loop needs to know of it. The programs' side is `StageKind`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from iccld import rng
from iccld.models.iccld import ICCLD
from iccld.uda.ema_profile import PowerAverages
from iccld.uda.settings import EmaProfileConfig
from iccld.uda.teacher import Teacher


class StageInputs(NamedTuple):
    """Inputs of the module, which `prepare` makes.

    `denominators` holds what each loss of this micro-batch would be divided by (valid pixels, samples). The trainer
    replaces them by their mean over the micro-batches of the global batch, so that the mean of the micro-batch losses
    is the loss of the global batch, however it is split.
    """

    tensors: dict[str, Tensor]
    denominators: dict[str, Tensor]


class StageOutput(NamedTuple):
    """Output of the module: `losses` are scalars whose sum is minimised.

    `metrics` are pairs (sum, count) `(2,)`, reported as sum / count; or two histograms `(2, n)`, the second being the
    reference of the first, reported as `NAME/distance` and `NAME/lost` (`runtime.measure.metrics.compared`). They
    are summed over micro-batches, ranks and steps.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class ViewKeeper(Protocol):
    """Cache of what `make` gives for a micro-batch: it computes or reads it."""

    def __call__(
        self, batch: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]: ...

    def raise_failures(self) -> None: ...

    def finish(self) -> None: ...


class Stage(ABC):
    """One training stage, built. It never calls backward, steps an optimiser or saves."""

    name: str
    module: Any
    """Module that the engine wraps, an `nn.Module`: `forward(StageInputs) -> StageOutput`."""
    student: Any
    """The part of it that is averaged, an `nn.Module`."""
    teacher: Teacher[Any]
    ema_profile: EmaProfileConfig
    profiles: PowerAverages | None = None
    view_cache: ViewKeeper | None = None
    """Cache in which `prepare` may keep what it computes, if the stage's `StageKind.cache` asks for it."""
    first_whole_step: int = 0
    """The first step that leaves nothing out, as a warm start does: from there on a step costs what the last one does.
    """

    @abstractmethod
    def prepare(self, batch: Mapping[str, Any], step: int) -> StageInputs:
        """Make the inputs of the module, without gradient: the teacher predicts, images are mixed, noise is drawn."""

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups: what trains, at which learning rate; each with a `name` if rates differ."""

    @abstractmethod
    def assemble_models(self) -> dict[str, ICCLD]:
        """Assemble the models as they are now: `teacher`, which the next stage starts from, and `student`.

        They share parts with the stage, which trains on; other parts may be copies: call this once, not in a loop.
        """

    def pseudo_labels_of(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return what the stage takes a batch's target images for now, to be looked at; None if it labels none.

        `(B, H, W)` uint8 class indices, 255 where a pixel is left out. No gradient is asked for.
        """
        return None

    def parts(self) -> dict[str, nn.Module]:
        """Return, by name, the parts whose work in a step is told apart."""
        return dict(self.module.named_children())

    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:  # noqa: B027, most stages have nothing to measure
        """Measure what the next stage needs, on one rank after the last step, with the stream's first batches."""

    def start(self) -> None:
        """Begin the averages, once the engine holds the module: of what this rank holds of it."""
        if self.ema_profile.widths:
            self.profiles = PowerAverages(dict(self.student.named_parameters()), self.ema_profile.widths)

    def after_step(self, step: int) -> None:
        """Update the averages after an optimiser step; `step` counts the steps done before it."""
        self.teacher.update(self.student, step)
        if self.profiles is not None:
            self.profiles.update(dict(self.student.named_parameters()), step)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what changes in training and is not in the engine: the tensors that a resume fills in place."""
        return self.teacher.state_dict() | (self.profiles.state_dict() if self.profiles is not None else {})

    def averages(self) -> dict[nn.Module, tuple[str, ...]]:
        """Return modules to be sharded as the trained one is, and their methods that are called like `forward`."""
        return {self.teacher.module: ()}

    def called_by_prepare(self) -> list[nn.Module]:
        """Return the networks that `prepare` calls by their own `__call__`; an engine that compiles compiles them."""
        return []

    def replicated(self) -> list[nn.Module]:
        """Return parts of `module` that no engine may shard: parameters used beside their own forward pass."""
        return []


def decayed_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, learning_rate: float, weight_decay: float, **options: Any
) -> list[dict[str, Any]]:
    """Divide the trainable parameters in two groups: matrices decay; norms, biases, scales, tokens, ... do not."""
    trainable = [(name, p) for name, p in parameters if p.requires_grad]
    decayed = [p for name, p in trainable if _is_matrix(name, p)]
    plain = [p for name, p in trainable if not _is_matrix(name, p)]
    groups = [(decayed, weight_decay), (plain, 0.0)]
    return [{"params": p, "lr": learning_rate, "weight_decay": decay, **options} for p, decay in groups if p]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is a matrix or a kernel; the response norms of ConvNeXtV2 are (1, 1, 1, C)."""
    is_vector = parameter.dim() <= 1 or (parameter.dim() > 2 and parameter.numel() == parameter.shape[-1])
    return not is_vector and not any(part in name for part in ("position", "token", "scale"))


def keyed_noise(domain: Mapping[str, Any], purpose: str, shape: Sequence[int], *, seed: int) -> Tensor:
    """Return the normal noise of a domain's samples, `(B, *shape)` float32: the stream's, or else drawn here."""
    if purpose in domain:
        return domain[purpose]
    device = domain["images"].device
    return rng.normal(tuple(shape), seed=seed, purpose=purpose, numbers=domain["numbers"], device=device)


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 `(B, 3, H, W)` into float32 in [0, 1]."""
    return images.float().div_(255.0)


def sum_and_count(total: Tensor, count: Tensor | float) -> Tensor:
    """Return a metric's (sum, count), detached, float32."""
    if not isinstance(count, Tensor):
        count = torch.full((), float(count), device=total.device)
    return torch.stack([total.detach().float(), count.detach().float()])
