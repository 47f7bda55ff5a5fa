"""The exponential-moving-average teacher: an fp32 copy outside the engine, always in eval mode."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def ema_decay(step: int, *, max_decay: float) -> float:
    """Return min(1 - 1/(step + 1), max_decay) (Tarvainen & Valpola); 0 after step 0 copies the student."""
    return min(1.0 - 1.0 / (step + 1), max_decay)


class Teacher(Generic[ModuleT]):
    """Holds `module`, the moving average of a student's parameters; buffers are copied.

    The copy is fp32 whatever the student's dtype: in bf16 an average with decay 0.999 stalls. Where both are sharded
    alike (FSDP2), a rank averages its own shards.
    """

    def __init__(self, student: ModuleT, *, max_decay: float) -> None:
        self.module: ModuleT = copy.deepcopy(student).float().eval().requires_grad_(False)
        self.max_decay = max_decay

    @torch.no_grad()
    def update(self, student: ModuleT, step: int) -> None:
        """Move towards the student after optimiser step `step`."""
        weight = 1.0 - ema_decay(step, max_decay=self.max_decay)
        averages = [own_part(p) for p in self.module.parameters()]
        current = [own_part(p).to(a.dtype) for a, p in zip(averages, student.parameters(), strict=True)]
        torch._foreach_lerp_(averages, current, weight)  # pyright: ignore[reportPrivateImportUsage]
        for average, buffer in zip(self.module.buffers(), student.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()


def own_part(parameter: Tensor) -> Tensor:
    """Return the rank's shard if student and teacher are sharded alike: no rank needs another's to average."""
    shard = getattr(parameter, "to_local", None)  # only a DTensor has it; importing the class takes long
    return shard().detach() if shard else parameter.detach()
