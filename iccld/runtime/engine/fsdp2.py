"""Backend FSDP2: parameters, gradients and moments sharded over the ranks along their first dimension.

It uses the native `fully_shard`: Accelerate's path needs a GPU, and on a CPU leaves modules unwrapped.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from iccld.runtime.checkpoint.pieces import Run, share_out, whole
from iccld.runtime.engine.backend import Backend, Terms
from iccld.runtime.tensors import local_tensor


class FSDP2(Backend):
    """Backend FSDP2. `replicated`: modules whose parameters stay whole, being used beside their own forward pass."""

    def __init__(
        self,
        raw: nn.Module,
        optimizer: torch.optim.Optimizer,
        terms: Terms,
        *,
        replicated: Iterable[nn.Module],
        min_num_params: int,
        reshard_after_forward: bool,
    ) -> None:
        self.raw = self.module = raw
        self.terms, self.optimizer = terms, optimizer
        self._mesh = init_device_mesh(terms.device.type, (terms.layout.world_size,))
        self._min_num_params = min_num_params
        self._whole = [p for module in replicated for p in module.parameters()]
        before = dict(raw.named_parameters())
        self._shard(raw, set(self._whole), reshard=reshard_after_forward)
        after = dict(raw.named_parameters())
        replaced = {id(before[name]): after[name] for name in before}
        for group in optimizer.param_groups:
            group["params"] = [replaced[id(p)] for p in group["params"]]

    def _shard(self, module: nn.Module, whole_params: set[nn.Parameter], *, reshard: bool) -> None:
        """Shard so that layers of some size gather their parameters one by one; the rest gathers with the root."""
        options: dict[str, Any] = {"mesh": self._mesh, "reshard_after_forward": reshard}
        layers = [layer for group in module.modules() if isinstance(group, nn.ModuleList) for layer in group]
        for layer in reversed(layers):  # inner layers before those that hold them
            size = sum(p.numel() for p in layer.parameters() if not isinstance(p, DTensor))
            is_whole = any(p in whole_params for p in layer.parameters())
            if not isinstance(layer, nn.ModuleList) and not is_whole and size >= self._min_num_params:
                fully_shard(layer, **options)
        fully_shard(module, **options, ignored_params=whole_params)

    def shard(self, module: nn.Module, *, methods: Iterable[str]) -> None:
        self._shard(module, set(), reshard=True)  # no backward pass would reshard it
        for method in methods:
            register_fsdp_forward_method(module, method)

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        self.raw.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        yield

    def step(self, *, with_norm: bool = False) -> None:
        self._average_whole()
        self.gradient_norm = None
        if self.terms.gradient_clip or with_norm:
            self._take_norm()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _average_whole(self) -> None:
        gradients = [p.grad for p in self._whole if p.grad is not None]
        if not gradients or self.terms.layout.world_size == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.terms.layout.world_size
        for gradient, average in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(average.view_as(gradient))

    def _take_norm(self) -> None:
        """Take the norm, and clip as `clip_grad_norm_`, which does not mix sharded and whole gradients."""
        gradients = [p.grad for p in self.parameters().values() if p.grad is not None]
        sharded = [local_tensor(g) for g in gradients if isinstance(g, DTensor)]
        kept = [g for g in gradients if not isinstance(g, DTensor)]
        square = torch.stack([g.square().sum() for g in sharded]).sum() if sharded else torch.zeros(())
        square = square.to(self.terms.device)
        torch.distributed.all_reduce(square)
        self.gradient_norm = norm = torch.sqrt(square + sum(g.square().sum() for g in kept))
        if self.terms.gradient_clip:
            factor = (self.terms.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*sharded, *kept], factor)  # pyright: ignore[reportPrivateImportUsage]

    def _run_held(self, tensor: Tensor) -> Run:
        if not isinstance(tensor, DTensor):
            return whole(tensor)
        shape, local = tuple(tensor.shape), tensor.to_local().detach()
        rows = -(-shape[0] // self.terms.layout.world_size)  # as torch.chunk: the last ranks may have fewer, or none
        first = min(self.terms.layout.rank * rows, shape[0])
        return Run(shape, first * math.prod(shape[1:]), local.reshape(-1))

    def _held_runs(self, tensors: Mapping[str, Tensor]) -> dict[str, Run]:
        sharded = {name: self._run_held(t) for name, t in tensors.items() if isinstance(t, DTensor)}
        kept = {name: whole(t) for name, t in tensors.items() if not isinstance(t, DTensor)}
        mine = share_out(kept, rank=self.terms.layout.rank, world_size=self.terms.layout.world_size)
        return mine | {name: run for name, run in sharded.items() if len(run.data)}

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
