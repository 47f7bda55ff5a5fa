"""Backends of an engine: they wrap a module, exchange gradients, step, and hand out a rank's state.

`Replicated` is DDP (or one process): every rank holds everything. `fsdp2.py` and `zero.py` shard.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from iccld.batch_layout import BatchLayout
from iccld.runtime.checkpoint.pieces import Run, TensorReader, share_out, whole
from iccld.runtime.tensors import local_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Terms:
    """Terms of the training that a backend needs besides the module: device, share of the batch, largest norm."""

    device: torch.device
    layout: BatchLayout
    gradient_clip: float = 0.0  # 0: off


class Backend(ABC):
    """One module and its AdamW on this rank.

    `raw` is the module itself, `module` what is called for a forward pass with gradients.
    """

    raw: nn.Module
    module: Callable[..., Any]
    optimizer: Any
    terms: Terms
    gradient_norm: Tensor | None = None
    """The norm of all gradients together in the last step, before they were clipped, on the device; None where that
    step did not take it."""

    def shard(self, module: nn.Module, *, methods: Iterable[str]) -> None:  # noqa: B027, most keep it whole
        """Hold a module that does not train as the trained one is held; `methods` are called like `forward`."""

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Surround forward and backward of one micro-batch; gradients are exchanged in the last one only."""
        yield

    def backward(self, loss: Tensor) -> None:
        (loss / self.terms.layout.num_accumulation).backward()

    @abstractmethod
    def step(self, *, with_norm: bool = False) -> None:
        """Clip, update, and clear the gradients. Clipping takes `gradient_norm`; `with_norm` does so without it."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return {name: p for name, p in self.raw.named_parameters() if p.requires_grad}

    def runs(self, extra: Mapping[str, Tensor]) -> dict[str, Run]:
        """Return what this rank writes of module, moments and `extra`, by full name; all ranks' runs are the whole."""
        state = {f"module/{name}": value for name, value in self.raw.state_dict().items()}
        return self._held_runs({**state, **extra}) | self._moment_runs()

    def _held_runs(self, tensors: Mapping[str, Tensor]) -> dict[str, Run]:
        runs = {name: whole(tensor) for name, tensor in tensors.items()}
        return share_out(runs, rank=self.terms.layout.rank, world_size=self.terms.layout.world_size)

    def _moment_runs(self) -> dict[str, Run]:
        state = self.optimizer.state
        return self._held_runs({f"{m}/{name}": state[p][m] for name, p in self.parameters().items() for m in MOMENTS})

    def load(self, reader: TensorReader, step: int) -> None:
        """Fill module and moments from a checkpoint made after `step` steps, whichever ranks and engine wrote it."""
        self.fill({f"module/{name}": value for name, value in self.raw.state_dict().items()}, reader)
        self._load_moments(reader, float(step))

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], reader: TensorReader) -> None:
        """Fill tensors in place, by full name: each rank reads what it holds."""
        for name, tensor in tensors.items():
            run = self._run_held(tensor)
            stored = reader.read(name, run.start, run.start + len(run.data))
            if run.shape != reader.shape(name):
                raise ValueError(f"{reader.folder}: {name} has shape {reader.shape(name)}, not {run.shape}.")
            local_tensor(tensor).copy_(stored.view(local_tensor(tensor).shape))

    def _run_held(self, tensor: Tensor) -> Run:
        return whole(tensor)

    @torch.no_grad()
    def _load_moments(self, reader: TensorReader, step: float) -> None:
        """Load AdamW's moments into parameters that each have a state of their own; `step` is what AdamW counts."""
        state = self.optimizer.state
        for name, p in self.parameters().items():
            state[p] = {"step": torch.tensor(step, device=p.device if p.is_cuda else "cpu")}
            for moment in MOMENTS:
                state[p][moment] = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.fill({f"{moment}/{name}": state[p][moment]}, reader)

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors, on every rank. Call on every rank."""
        return dict(tensors)

    def held(self) -> dict[str, dict[str, Tensor]]:
        """Return what this rank holds of weights, gradients and optimiser (moments; under ZeRO also its fp32 copy)."""
        weights = dict(self.raw.state_dict(keep_vars=True))
        names = {id(tensor): name for name, tensor in weights.items()}
        optimiser: dict[str, Tensor] = {}
        for number, (p, state) in enumerate(self.optimizer.state.items()):
            name = names.get(id(p), f"group {number}")
            copy = {} if id(p) in names else {"copy": p}
            optimiser |= {f"{kind}/{name}": t for kind, t in {**state, **copy}.items() if isinstance(t, Tensor)}
        gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
        return {"weights": weights, "gradients": gradients, "optimiser moments": optimiser}


class Replicated(Backend):
    """Backend of one process, or DDP through Accelerate."""

    def __init__(self, raw: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any, terms: Terms) -> None:
        self.raw, self.terms, self._accelerator = raw, terms, accelerator
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate's argument
            self.module, self.optimizer = accelerator.prepare(raw, optimizer)
        if isinstance(self.module, DistributedDataParallel):
            self._settle_buckets(self.module.reducer)

    def _settle_buckets(self, reducer: Any) -> None:
        """Let DDP lay out its buckets once and now, in reverse order of the parameters. Call on every rank.

        By itself it does so after its first backward pass, by that pass. Where a gradient lies in a bucket decides in
        which order three or more ranks add it up, and so its last bits: the first step of a resumed run would differ
        from that step of an undisturbed one.
        """
        reducer.prepare_for_backward([])
        torch.stack([p.sum() for p in self.parameters().values()]).sum().backward()
        reducer._rebuild_buckets()
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        # DDP decides in the forward pass whether the backward pass will exchange gradients.
        with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self.module):
            yield

    def step(self, *, with_norm: bool = False) -> None:
        self.gradient_norm = None
        if self.terms.gradient_clip:
            self.gradient_norm = self._accelerator.clip_grad_norm_(self.raw.parameters(), self.terms.gradient_clip)
        elif with_norm:
            gradients = [p.grad for p in self.raw.parameters() if p.grad is not None]
            self.gradient_norm = torch.nn.utils.get_total_norm(gradients)
        self.optimizer.step()
        self.optimizer.zero_grad()
