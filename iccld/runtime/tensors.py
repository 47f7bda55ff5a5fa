"""Nested batches of tensors, and the local part of a tensor that may be sharded."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

ON_HOST = ("numbers",)
"""Names of tensors that stay on the host: the samples' numbers, by which it keys draws in every step."""


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply `function` to every tensor of a nested batch of dictionaries, except those of `ON_HOST`."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: value if key in ON_HOST else map_tensors(value, function) for key, value in batch.items()}
    return batch


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[union-attr,operator]


def bytes_of(tensor: Tensor) -> int:
    """Count the bytes of this rank's part of a tensor."""
    held = local_tensor(tensor)
    return held.numel() * held.element_size()
