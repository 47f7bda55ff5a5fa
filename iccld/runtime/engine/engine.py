"""The one owner of Accelerate: ranks, devices and precision; which backend trains is said by accelerate's YAML."""

import atexit
import contextlib
import gc
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from iccld.runtime.checkpoint.pieces import Run, TensorReader
from iccld.runtime.collectives import groups, keep_record, set_timeout
from iccld.runtime.device import check_own, choose_kernels, identity, may_share, with_index
from iccld.runtime.engine.backend import Backend, Plan, Replicated
from iccld.runtime.engine.compilation import Compile, compile_in_place
from iccld.runtime.engine.kind import EngineKind, join_alone, kind_of_launch, without_plugins
from iccld.runtime.engine.prefetch import prefetch
from iccld.runtime.faults.preemption import host_name

# A dimension of size 1 has any stride: DDP warns of 1x1 and depthwise kernels, in vain.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

PLAIN_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
INIT_TIMEOUT = timedelta(minutes=5)  # for all ranks to come together, once the first is there
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LEAVE_S = 180.0  # for the others to be done, too; one may wait a minute for telemetry


class Precision(Enum):
    """Of the forward and backward pass; weights, moments and averages are fp32."""

    fp32 = "no"
    bf16 = "bf16"
    fp16 = "fp16"  # named to be refused with a reason


class MatmulPrecision(Enum):
    """Precision of fp32 matrix products on a GPU: fp32, TF32, or pairs of bf16 (torch.set_float32_matmul_precision)."""

    highest = "highest"
    high = "high"
    medium = "medium"


@dataclass
class EngineConfig:
    """Precision, compilation and kernels; how ranks are formed is accelerate's YAML."""

    precision: Precision = Precision.fp32
    compile: Compile = Compile.auto
    deterministic: bool = False  # the same bits in each run on a GPU too; slower there
    matmul_precision: MatmulPrecision = MatmulPrecision.highest
    cudnn_benchmark: bool = True  # try convolution kernels at each new shape; never where deterministic

    def __post_init__(self) -> None:
        if Precision.fp16 in (self.precision, Precision(os.environ.get("ACCELERATE_MIXED_PRECISION") or "no")):
            raise ValueError(
                "engine.precision=fp16 is refused: the discriminator's small gradients vanish in it, and loss scaling "
                "skips steps, so that the position would no longer be the number of updates; use bf16 or fp32."
            )


class Engine:
    """Ranks and device of this process; after `attach`, also the module's backend."""

    backend: Backend

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.kind = config, kind_of_launch()
        keep_record()
        choose_kernels(
            deterministic=config.deterministic,
            matmul_precision=config.matmul_precision.value,
            cudnn_benchmark=config.cudnn_benchmark,
        )
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # a rank's GPU need not have its local rank's number
        with without_plugins():
            self.accelerator = Accelerator(
                cpu=not torch.cuda.is_available(),
                mixed_precision=config.precision.value,
                step_scheduler_with_optimizer=False,
                kwargs_handlers=[
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                    InitProcessGroupKwargs(timeout=INIT_TIMEOUT, **({"backend": "gloo"} if may_share() else {})),
                ],
            )
        if self.accelerator.distributed_type not in PLAIN_TYPES:
            raise ValueError(
                f"accelerate's distributed_type={self.accelerator.distributed_type.value} is not supported; "
                f"launch with one of accelerate_configs/."
            )
        self.device = with_index(self.accelerator.device)
        self.compile = config.compile.on(self.device)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.kind is not EngineKind.ddp and not torch.distributed.is_initialized():
            join_alone(self.device)
        # Groups of their own on the host: agreeing on a flag must not wait for the device, a save not for training.
        own = [torch.distributed.new_group(backend="gloo") if self.world_size > 1 else None for _ in range(2)]
        self._host_group, self._save_group = own
        check_own(self.gather_objects((host_name(), identity(self.device))))
        self.set_timeout(COLLECTIVE_TIMEOUT.total_seconds(), of_saves=True)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether a rank holds only a part of the weights."""
        return self.kind is EngineKind.fsdp2

    def attach(
        self,
        module: nn.Module,
        param_groups: list[dict[str, Any]],
        *,
        micro_batch_size: int = 1,
        num_accumulation: int,
        gradient_clip: float = 0.0,
        replicated: Iterable[nn.Module] = (),
        frozen: Iterable[nn.Module] = (),
    ) -> None:
        """Wrap the module for the ranks and build AdamW over the groups. `replicated`: parts that no engine may shard.

        `gradient_clip`: the largest norm; 0 is off. `frozen`: what a step calls beside the module, without gradient.
        """
        self.detach()
        self._base_rates = [group["lr"] for group in param_groups]
        raw = module.to(self.device)
        compile_in_place([raw, *frozen], self.compile)
        optimizer = torch.optim.AdamW(param_groups, fused=True)
        plan = Plan(self.device, self.rank, self.world_size, micro_batch_size, num_accumulation, gradient_clip)
        self.backend = self._backend(raw, optimizer, plan, replicated)

    def _backend(self, raw: nn.Module, optimizer: Any, plan: Plan, replicated: Iterable[nn.Module]) -> Backend:
        if self.kind is EngineKind.ddp:
            return Replicated(raw, optimizer, self.accelerator, plan)
        raw = self.accelerator.prepare_model(raw, evaluation_mode=True)  # autocast alone
        if self.kind is EngineKind.fsdp2:
            from iccld.runtime.engine.fsdp2 import FSDP2

            return FSDP2(
                raw,
                optimizer,
                plan,
                replicated=replicated,
                min_num_params=int(float(os.environ.get("FSDP_MIN_NUM_PARAMS", "1e6"))),
                reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true",
            )
        from iccld.runtime.engine.zero import Zero  # deepspeed takes seconds to import

        return Zero(raw, optimizer, plan, stage=1 if self.kind is EngineKind.zero1 else 2)

    def detach(self) -> None:
        """Let go of the module and its optimiser, so that the next ones have the memory."""
        self.accelerator.free_memory()
        self.__dict__.pop("backend", None)
        gc.collect()  # DeepSpeed's engines hold themselves in cycles

    @property
    def module(self) -> Any:
        """What is called for a forward pass with gradients."""
        return self.backend.module

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return self.accelerator.autocast()

    def prefetch(self, batches: Iterator[Any], **options: Any) -> Iterator[Any]:
        """The batches on this rank's device; see `prefetch`."""
        return prefetch(batches, self.device, **options)

    def set_learning_rate(self, factor: float) -> None:
        for group, rate in zip(self.backend.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; ranks exchange gradients in the last one of a step only."""
        return self.backend.micro_batch(is_last=is_last)

    def backward(self, loss: Tensor) -> None:
        """Add the micro-batch's gradient, so that the step's is the mean over its micro-batches."""
        self.backend.backward(loss)

    def step(self) -> None:
        self.backend.step()

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
        return self._gather(value, self._host_group)

    def gather_saved(self, value: Any) -> list[Any]:
        """As `gather_objects`, for one background thread a rank, while the ranks train."""
        return self._gather(value, self._save_group)

    def _gather(self, value: Any, group: Any) -> list[Any]:
        if group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=group)
        return values

    def barrier(self) -> None:
        self.gather_objects(None)

    def set_timeout(self, seconds: float, *, of_saves: bool = False) -> None:
        """Of the collectives that begin from now on, also, or not, of those of background saves."""
        set_timeout(seconds, but=[] if of_saves else [self._save_group])

    def layout(self) -> dict[str, Any]:
        """What decides whether a checkpoint of this engine resumes to the bit."""
        return {
            "engine": self.kind.value,
            "world_size": self.world_size,
            "num_accumulation": self.backend.plan.num_accumulation,
            "precision": self.config.precision.name,
        }

    def runs(self, extra: Mapping[str, Tensor]) -> dict[str, Run]:
        """What this rank writes of module, optimiser and `extra` into a checkpoint."""
        return self.backend.runs(extra)

    def load(self, reader: TensorReader, step: int, extra: Mapping[str, Tensor]) -> None:
        """Fill module, optimiser and `extra`, in place, from a checkpoint of any engine and number of ranks."""
        self.backend.load(reader, step)
        self.backend.fill(extra, reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Let another engine be made in this process; it joins the same process group, left at the process's end.

        After an error the group is not left: others may wait in it, and its threads would meet them half gone.
        """
        global _is_in_order
        _is_in_order = error is None
        if error is None:
            set_timeout(LEAVE_S, but=[group for group in groups() if group is not self._host_group])
            with contextlib.suppress(RuntimeError):  # one that is late, or gone, must not fail those that are done
                self.barrier()
        AcceleratorState._reset_state()
        GradientState._reset_state()


_is_in_order = True


@atexit.register
def _leave_process_group() -> None:
    if torch.distributed.is_initialized() and _is_in_order:
        torch.distributed.destroy_process_group()
