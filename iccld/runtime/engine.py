"""The one owner of Accelerate: ranks, devices, precision, gradient averaging, clipping and the optimiser."""

import atexit
import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from iccld.runtime.prefetch import prefetch

# A dimension of size 1 has any stride: DDP warns of 1x1 and depthwise kernels, in vain.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class Precision(Enum):
    """fp16 is left out: its loss scaling hides what the discriminator's small gradients do."""

    fp32 = "no"
    bf16 = "bf16"


@dataclass
class EngineConfig:
    """Precision and compilation; how ranks are formed is accelerate's YAML."""

    precision: Precision = Precision.fp32
    compile: bool = False


class Engine:
    """Ranks and device of this process; after `attach`, also the wrapped module and its optimiser."""

    module: nn.Module
    optimizer: Any

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=config.precision.value,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            ],
        )
        if self.accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            raise ValueError(
                f"accelerate's distributed_type={self.accelerator.distributed_type.value} is not supported; "
                f"launch with accelerate_configs/cpu.yaml or ddp.yaml."
            )
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        # A group of its own on the host: agreeing on a flag must not wait for the device.
        self._host_group = torch.distributed.new_group(backend="gloo") if self.world_size > 1 else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def attach(
        self,
        module: nn.Module,
        param_groups: list[dict[str, Any]],
        *,
        num_accumulation: int,
        gradient_clip: float = 0.0,
    ) -> None:
        """Wrap the module for the ranks and build AdamW over the groups.

        `gradient_clip`: the largest norm; 0 is off.
        """
        self.accelerator.free_memory()  # an earlier stage's module and optimiser
        self.num_accumulation, self.gradient_clip = num_accumulation, gradient_clip
        self._base_rates = [group["lr"] for group in param_groups]
        optimizer = torch.optim.AdamW(param_groups, fused=self.device.type == "cuda" or None)
        self._raw = module.to(self.device)
        if self.config.compile:
            self._raw.compile()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate's argument
            self.module, self.optimizer = self.accelerator.prepare(self._raw, optimizer)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return self.accelerator.autocast()

    def prefetch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches on this rank's device; see `prefetch`."""
        return prefetch(batches, self.device)

    def set_learning_rate(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the micro-batch's gradient; ranks exchange gradients in the last one of a step only."""
        with self._synchronisation(is_last):
            self.accelerator.backward(loss / self.num_accumulation)

    @contextlib.contextmanager
    def forward_context(self, *, is_last: bool) -> Iterator[None]:
        """DDP decides in the forward pass whether the backward pass will exchange gradients."""
        with self._synchronisation(is_last):
            yield

    def _synchronisation(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.module)

    def step(self) -> None:
        if self.gradient_clip:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; the tensor itself on one rank."""
        if self.world_size > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_values(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over ranks of same-shaped float tensors, all in one collective. Ranks must hold the same names."""
        names = sorted(values)
        if not names:
            return {}
        total = self.all_reduce_sum(torch.stack([values[name].detach().float() for name in names]))
        return dict(zip(names, total, strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; agreed on by the hosts, so no device is waited for."""
        if self._host_group is None:
            return flag
        tensor = torch.tensor(float(flag))
        torch.distributed.all_reduce(tensor, group=self._host_group)
        return bool(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        """One small picklable value of each rank, on every rank."""
        if self._host_group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self._host_group)
        return values

    def barrier(self) -> None:
        self.gather_objects(None)

    def layout(self) -> dict[str, Any]:
        """What decides whether a checkpoint of this engine resumes to the bit."""
        return {
            "engine": "ddp",
            "world_size": self.world_size,
            "num_accumulation": self.num_accumulation,
            "precision": self.config.precision.name,
        }

    def state_dicts(self) -> dict[str, dict[str, Any]]:
        """The module's and the optimiser's state, each under the name of its checkpoint part."""
        return {"module": self._raw.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dicts(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        self._raw.load_state_dict(states["module"])
        self.optimizer.load_state_dict(states["optimizer"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let another engine be made in this process; it joins the same process group, left when the process ends."""
        AcceleratorState._reset_state()
        GradientState._reset_state()


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


atexit.register(_leave_process_group)
