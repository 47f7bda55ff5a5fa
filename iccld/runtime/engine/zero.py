"""Backends of DeepSpeed, which only this file uses: ZeRO stages 1 (sharded moments) and 2 (also gradients).

Weights stay fp32 and whole.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor, nn

from iccld.runtime.checkpoint.pieces import Run, TensorReader
from iccld.runtime.engine.backend import MOMENTS, Backend, Terms

# DeepSpeed would compile it on a CPU at the start, which takes a minute and a compiler; gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# As DDP, tens of MB; by default DeepSpeed holds 2 GB for gradients on their way.
BUCKET_ELEMENTS = 10_000_000


@contextlib.contextmanager
def _local_rank_of(device: torch.device) -> Iterator[None]:
    """Let LOCAL_RANK be the number of this rank's GPU: DeepSpeed takes the GPU of that number, and may see fewer."""
    own = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or own is None:
        yield
        return
    os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = own


class Zero(Backend):
    """Backend of ZeRO; `stage` is 1 or 2."""

    def __init__(self, raw: nn.Module, optimizer: torch.optim.Optimizer, terms: Terms, *, stage: int) -> None:
        self.raw, self.terms, layout = raw, terms, terms.layout
        config = {
            "train_micro_batch_size_per_gpu": layout.micro_batch_size,
            "gradient_accumulation_steps": layout.num_accumulation,
            "train_batch_size": layout.global_batch_size,
            "gradient_clipping": 0.0,  # by `_take_norm`
            "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a step
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                "compute_grad_norm": False,  # by `_take_norm`
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "allgather_bucket_size": BUCKET_ELEMENTS,
            },
            "steps_per_print": 1 << 60,
        }
        deepspeed.logger.setLevel("WARNING")
        with _local_rank_of(terms.device):
            self.module: Any = deepspeed.initialize(model=raw, optimizer=optimizer, config=config)[0]
        self._zero: Any = self.module.optimizer
        self.optimizer = self._zero.optimizer

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)  # divides by the accumulation
        if not self.module.is_gradient_accumulation_boundary():
            self.module.step()  # counts the micro-batch

    def step(self, *, with_norm: bool = False) -> None:
        self.gradient_norm = None
        if self.terms.gradient_clip or with_norm:
            self._take_norm()
        self.module.step()

    def _take_norm(self) -> None:
        """Take the norm over all ranks, which stays on the device, and clip what this rank holds of the gradients.

        DeepSpeed's own clipping reads the norm on the host, which would wait there for the device.
        """
        groups = self._zero.averaged_gradients.values()
        gradients = [gradient for group in groups for gradient in group or () if gradient is not None]
        square = torch.zeros((), device=self.terms.device)
        if gradients:
            square += torch.stack(torch._foreach_norm(gradients)).square().sum()  # pyright: ignore[reportPrivateImportUsage]
        torch.distributed.all_reduce(square)
        self.gradient_norm = square.sqrt()
        if self.terms.gradient_clip:
            factor = (self.terms.gradient_clip / (self.gradient_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]

    def _fragments(self) -> Iterator[tuple[str, tuple[int, ...], int, int, Any]]:
        """Yield name, shape, first element, partition and place in it of each parameter that this rank has part of."""
        for name, p in self.parameters().items():
            mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                partition = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
                yield name, tuple(p.shape), mapping.lp_fragment_address.start, partition, mapping.hp_fragment_address

    def _moment_runs(self) -> dict[str, Run]:
        return {
            f"{moment}/{name}": Run(
                shape, start, self.optimizer.state[partition][moment].narrow(0, place.start, place.numel)
            )
            for name, shape, start, partition, place in self._fragments()
            for moment in MOMENTS
        }

    @torch.no_grad()
    def _load_moments(self, reader: TensorReader, step: float) -> None:
        self._zero.refresh_fp32_params()  # from the module's weights, which are filled
        for partition in self._zero.single_partition_of_fp32_groups:
            self.optimizer.state[partition] = {
                "step": torch.tensor(step, device=partition.device if partition.is_cuda else "cpu"),
                **{moment: torch.zeros_like(partition) for moment in MOMENTS},
            }
        for name, run in self._moment_runs().items():
            reader.fill(name, run)
