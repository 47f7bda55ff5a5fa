"""The local part of a tensor that may be sharded."""

from torch import Tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[union-attr,operator]


def bytes_of(tensor: Tensor) -> int:
    """Count the bytes of this rank's part of a tensor."""
    held = local_tensor(tensor)
    return held.numel() * held.element_size()
