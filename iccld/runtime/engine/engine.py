"""The engine: a module attached to this rank's device and to the other ranks, its step and its state.

Only this file uses Accelerate, which forms the ranks. Accelerate's YAML says which backend trains.
"""

import atexit
import contextlib
import gc
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from enum import Enum
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from iccld.batch_layout import BatchLayout
from iccld.node import host_name
from iccld.runtime.batches import prefetch
from iccld.runtime.checkpoint.pieces import Run, TensorReader
from iccld.runtime.engine.backend import Backend, Replicated, Terms
from iccld.runtime.engine.compilation import choose_compile, compile_in_place, lacks_for_compiling
from iccld.runtime.engine.device import check_own, choose_kernels, identity, may_share, with_index
from iccld.runtime.ranks import Ranks, keep_record, naming_lost_ranks
from iccld.runtime.settings import Compile, EngineConfig
from iccld.runtime.tensors import local_tensor

# A dimension of size 1 has any stride: DDP warns of 1x1 and depthwise kernels, in vain.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

PLAIN_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
JOIN_S = 300.0  # for all ranks to join, once the first one has


class EngineKind(Enum):
    """Kinds of engine: every rank holds everything, or ranks hold shards of moments, gradients and weights."""

    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    fsdp2 = "fsdp2"


def kind_of_launch() -> EngineKind:
    """Return the engine of the launcher's YAML. Raises ValueError for what is not one of accelerate_configs/."""
    environment = os.environ
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        if (version := environment.get("FSDP_VERSION")) != "2":
            raise ValueError(f"fsdp_version={version} is not supported; launch with accelerate_configs/fsdp2.yaml.")
        return EngineKind.fsdp2
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if stage not in ("1", "2"):
            raise ValueError(
                f"zero_stage={stage} is not supported: parts of a module that are used beside its forward pass would "
                f"be empty; launch with accelerate_configs/fsdp2.yaml, which also shards weights, or zero2.yaml."
            )
        return EngineKind[f"zero{stage}"]
    return EngineKind.ddp


@contextlib.contextmanager
def without_plugins() -> Iterator[None]:
    """Let Accelerate form ranks and precision only; its FSDP and DeepSpeed wrappers would lose gradients on a CPU."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _time_to_join() -> timedelta:
    """Return how long ranks wait for others: longer than rank 0 of a SLURM job, which names the missing ones first."""
    return timedelta(seconds=float(os.environ.get("ICCLD_GATHER_S", "0")) + JOIN_S)


def join_alone(device: torch.device) -> None:
    """Join a process group of one rank, for backends that need one."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]


class Engine:
    """The device and the `ranks` of this process; after `attach`, also the module's backend."""

    ranks: Ranks
    backend: Backend

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.kind = config, kind_of_launch()
        config.refuse_other_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", ""))
        keep_record()
        choose_kernels(
            deterministic=config.deterministic,
            matmul_precision=config.matmul_precision.value,
            cudnn_benchmark=config.cudnn_benchmark,
        )
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # a rank's GPU need not have its local rank's number
        exchange = {"backend": "gloo"} if may_share() and "LOCAL_RANK" in os.environ else {}
        with without_plugins(), naming_lost_ranks():
            self.accelerator = Accelerator(
                cpu=not torch.cuda.is_available(),
                mixed_precision=config.precision.value,
                step_scheduler_with_optimizer=False,
                kwargs_handlers=[
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                    InitProcessGroupKwargs(timeout=_time_to_join(), **exchange),
                ],
            )
        if self.accelerator.distributed_type not in PLAIN_TYPES:
            raise ValueError(
                f"accelerate's distributed_type={self.accelerator.distributed_type.value} is not supported; "
                f"launch with one of accelerate_configs/."
            )
        self.device = with_index(self.accelerator.device)
        if self.kind is not EngineKind.ddp and not torch.distributed.is_initialized():
            join_alone(self.device)
        with naming_lost_ranks():
            self.ranks = Ranks.joined(self.accelerator.process_index, self.accelerator.num_processes)
            check_own(self.ranks.gather((host_name(), identity(self.device))))
            self.compile = self._choose_compile()

    def _choose_compile(self) -> Compile:
        """Choose alike on all ranks; the first that lacks something decides."""
        how = self.config.compile.on(self.device.type)
        lacks = "" if how is Compile.none else lacks_for_compiling(self.device.type)
        lacks = next(filter(None, self.ranks.gather(lacks)), "")
        chosen = choose_compile(self.config.compile, self.device.type, lacks=lacks)
        if chosen is not how and self.ranks.is_main:
            print(f"engine.compile=auto: nothing is compiled, which is slower: {lacks}", flush=True)
        return chosen

    @property
    def is_sharded(self) -> bool:
        """Tell whether a rank holds only a part of the weights."""
        return self.kind is EngineKind.fsdp2

    def attach(
        self,
        module: nn.Module,
        param_groups: list[dict[str, Any]],
        *,
        layout: BatchLayout,
        gradient_clip: float = 0.0,
        replicated: Iterable[nn.Module] = (),
        called_by_prepare: Iterable[nn.Module] = (),
    ) -> None:
        """Wrap the module for the ranks and build AdamW over the groups.

        `replicated`: parts that no engine may shard. `gradient_clip`: the largest norm; 0 is off. `called_by_prepare`:
        networks that a step calls before the module, without a gradient.
        """
        if "backend" in self.__dict__:
            self.detach()
        self._base_rates = [group["lr"] for group in param_groups]
        raw = module.to(self.device)
        compile_in_place([raw, *called_by_prepare], self.compile)
        optimizer = torch.optim.AdamW(param_groups, fused=True)
        terms = Terms(self.device, layout, gradient_clip)
        self.backend = self._backend(raw, optimizer, terms, replicated)

    def _backend(self, raw: nn.Module, optimizer: Any, terms: Terms, replicated: Iterable[nn.Module]) -> Backend:
        if self.kind is EngineKind.ddp:
            return Replicated(raw, optimizer, self.accelerator, terms)
        raw = self.accelerator.prepare_model(raw, evaluation_mode=True)  # autocast alone
        if self.kind is EngineKind.fsdp2:
            from iccld.runtime.engine.fsdp2 import FSDP2

            return FSDP2(
                raw,
                optimizer,
                terms,
                replicated=replicated,
                min_num_params=int(float(os.environ.get("FSDP_MIN_NUM_PARAMS", "1e6"))),
                reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true",
            )
        from iccld.runtime.engine.zero import Zero  # deepspeed takes seconds to import

        return Zero(raw, optimizer, terms, stage=1 if self.kind is EngineKind.zero1 else 2)

    def detach(self) -> None:
        """Release the module and its optimiser, so that the next ones have the memory."""
        self.accelerator.free_memory()
        self.__dict__.pop("backend", None)
        gc.collect()  # DeepSpeed's engines hold themselves in cycles

    @property
    def module(self) -> Any:
        """Return what is called for a forward pass with gradients."""
        return self.backend.module

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return self.accelerator.autocast()

    def prefetch(self, batches: Iterator[Any], **options: Any) -> Iterator[Any]:
        """Return the batches on this rank's device; see `prefetch`."""
        return prefetch(batches, self.device, **options)

    def set_learning_rate(self, factor: float) -> None:
        for group, rate in zip(self.backend.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    def learning_rates(self) -> dict[str, float]:
        """The rates of the last step: `learning_rate`, or `learning_rate/NAME` by groups that do not share one."""
        groups = self.backend.optimizer.param_groups
        if len(set(self._base_rates)) == 1:
            return {"learning_rate": groups[0]["lr"]}
        return {f"learning_rate/{group.get('name', i)}": group["lr"] for i, group in enumerate(groups)}

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Surround forward and backward of a micro-batch; ranks exchange gradients only in a step's last one."""
        return self.backend.micro_batch(is_last=is_last)

    def backward(self, loss: Tensor) -> None:
        """Add the micro-batch's gradient, scaled so that the step's is the mean over its micro-batches."""
        self.backend.backward(loss)

    def step(self, *, with_norm: bool = False) -> None:
        """Make the optimiser's step; `with_norm` takes `gradient_norm` even if nothing is clipped by it."""
        self.backend.step(with_norm=with_norm)

    def has_finite_weights(self) -> bool:
        """Tell whether the trained weights of all ranks are finite. Waits for the device. Call on every rank."""
        norms = torch._foreach_norm([local_tensor(p.detach()) for p in self.backend.parameters().values()])  # pyright: ignore[reportPrivateImportUsage]
        return not self.ranks.any(not bool(torch.stack(norms).isfinite().all()))

    def facts_of_step(self) -> dict[str, float | Tensor]:
        """Learning rates and, if it was taken, the gradients' norm of the last step; alike on all ranks."""
        norm = self.backend.gradient_norm
        return self.learning_rates() | ({} if norm is None else {"gradient_norm": norm})

    def resume_facts(self) -> dict[str, Any]:
        """Return the facts that decide whether a checkpoint of this engine resumes to the bit."""
        return {
            "engine": self.kind.value,
            "world_size": self.ranks.world_size,
            "num_accumulation": self.backend.terms.layout.num_accumulation,
            "precision": self.config.precision.name,
        }

    def runs(self, extra: Mapping[str, Tensor]) -> dict[str, Run]:
        """Return what this rank writes of module, optimiser and `extra` into a checkpoint."""
        return self.backend.runs(extra)

    def load(self, reader: TensorReader, step: int, extra: Mapping[str, Tensor]) -> None:
        """Fill module, optimiser and `extra`, in place, from a checkpoint of any engine and number of ranks."""
        self.backend.load(reader, step)
        self.backend.fill(extra, reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Let another engine be made in this process; it joins the same process group, which is left at the end.

        After an error the group is not left: others may wait in it, and its threads would meet them half gone.
        """
        global _is_in_order
        _is_in_order = error is None
        if error is None:
            self.ranks.leave()
        AcceleratorState._reset_state()
        GradientState._reset_state()


_is_in_order = True


@atexit.register
def _leave_process_group() -> None:
    if torch.distributed.is_initialized() and _is_in_order:
        torch.distributed.destroy_process_group()
