"""Floating-point operations of a training step, from shapes alone: on device meta, without memory or arithmetic.

They are *model* FLOPs, as in MFU: two a multiply-add of the convolutions, matrix products and attentions that the model
asks for, whichever kernel does them. What is computed once more to save memory (activation checkpointing, flash
attention's backward pass) does not count, a causal mask saves nothing, and element-wise work is left out.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from iccld.graph import nodes_behind
from iccld.runtime.batches import map_tensors

T = TypeVar("T")

OTHER = "other"
"""Name of the work outside of all parts."""


class StepFlops(NamedTuple):
    """FLOPs by part: of `prepare`, which has no gradient, and of the trained module's forward and backward pass."""

    prepare: dict[str, int]
    forward: dict[str, int]
    backward: dict[str, int]

    @property
    def total(self) -> int:
        return sum(sum(by_part.values()) for by_part in self)


class Countable(Protocol):
    """Stage whose work can be counted: `prepare` gives what `module` takes, and the module's output has `losses`."""

    @property
    def module(self) -> Any: ...

    def prepare(self, batch: Mapping[str, Any], step: int) -> Any: ...

    def parts(self) -> Mapping[str, nn.Module]: ...


def count_step(stage: Countable, batch: Mapping[str, Any], step: int) -> StepFlops:
    """Count the FLOPs of one micro-batch at `step`. The stage is copied to device meta first, and stays unchanged.

    Call it before an engine shards the stage: a shard's shapes do not tell the whole.
    """
    twin = on_meta(stage)
    with torch.no_grad(), FlopCounter(twin.parts()) as prepared:
        inputs = twin.prepare(map_tensors(batch, lambda tensor: tensor.to("meta")), step)
    with torch.enable_grad(), FlopCounter(twin.parts()) as trained:
        losses = twin.module(inputs).losses
    return StepFlops(dict(prepared.forward), dict(trained.forward), dict(trained.backward(losses.values())))


def on_meta(whole: T) -> T:
    """Copy any object deeply to device meta, where tensors have shapes but no memory."""
    with _Emptied():
        return copy.deepcopy(whole)


class _Emptied(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ or func is Tensor.clone:  # parameters copy themselves by the latter
            return torch.empty_like(args[0], device="meta", requires_grad=args[0].requires_grad)
        return func(*args, **(kwargs or {}))


class FlopCounter(TorchFunctionMode):
    """Counts the calls within its context, for the innermost of the named `parts` that is running.

    Raises ValueError if something is called that does matrix products, but has no rule here.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.forward: Counter[str] = Counter()
        self._parts, self._running, self._hooks = parts, [OTHER], []
        self._backward: list[tuple[Any, str, int]] = []

    def __enter__(self) -> Self:
        for name, part in self._parts.items():
            self._hooks.append(part.register_forward_pre_hook(partial(self._start, name)))
            self._hooks.append(part.register_forward_hook(self._stop, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    @property
    def running(self) -> str:
        """Return the part that is running."""
        return self._running[-1]

    def _start(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _stop(self, *_: Any) -> None:
        self._running.pop()

    def backward(self, losses: Iterable[Tensor]) -> Counter[str]:
        """Count the gradient of these losses: work that none of them depends on has no backward pass."""
        reached, total = nodes_behind(losses), Counter[str]()
        for node, part, flops in self._backward:
            total[part] += flops if node in reached else 0
        return +total

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is torch.autograd.grad:  # a gradient within the step has a backward pass of its own
            self.forward += self.backward([args[0]] if isinstance(args[0], Tensor) else args[0])
        out = func(*args, **kwargs)
        if name in UNKNOWN:
            raise ValueError(f"FLOPs: torch's {name} has no rule; call matmul, or add a rule to measure/flops.py.")
        if rule := RULES.get(name):
            operands = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            flops, num_gradients = rule(out, *operands)
            self.forward[self.running] += flops
            if out.grad_fn is not None and num_gradients:
                self._backward.append((out.grad_fn, self.running, num_gradients * flops))
        return out


# A rule gets the output and the tensors that it was made of, and returns the FLOPs of the forward pass and how many
# times as many the backward pass has: once for each operand that has a gradient.


def _product(out: Tensor, a: Tensor, b: Tensor, *_: Tensor) -> tuple[int, int]:
    return 2 * out.numel() * a.shape[-1], a.requires_grad + b.requires_grad


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Tensor) -> tuple[int, int]:
    return 2 * out.numel() * math.prod(weight.shape[1:]), x.requires_grad + weight.requires_grad


def _transposed(out: Tensor, x: Tensor, weight: Tensor, *_: Tensor) -> tuple[int, int]:
    return 2 * x.numel() * math.prod(weight.shape[1:]), x.requires_grad + weight.requires_grad


def _attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[int, int]:
    flops = 2 * math.prod(out.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    return flops, 2 * (q.requires_grad or k.requires_grad or v.requires_grad)


RULES: dict[str, Callable[..., tuple[int, int]]] = {
    **dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm", "mv"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), lambda out, added, a, b: _product(out, a, b)),
    "__rmatmul__": lambda out, b, a: _product(out, a, b),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "scaled_dot_product_attention": _attention,
}
UNKNOWN = {"einsum", "tensordot", "bilinear", "addbmm", "chain_matmul", "cdist", "multi_head_attention_forward"}
