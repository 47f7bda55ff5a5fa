"""Packing of a batch's tensors into one piece of memory, so that the loader fetches one piece from a busy worker."""

import errno
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from iccld.data.config import DataConfig
from iccld.data.stream.workers import SHARED_MEMORY

ALIGNMENT = 64  # bytes
NUM_AHEAD = 2  # batches that a worker makes ahead
LOCKS_BYTES = 8 * 4096  # a worker's own queue, and the shared one

Batch = dict[str, dict[str, Any]]


class TensorLayout(NamedTuple):
    """Place of a tensor's bytes, and how they are read."""

    begin: int
    dtype: torch.dtype
    shape: Sequence[int]  # the loader turns a tuple into a list
    stride: Sequence[int]

    def view(self, memory: Tensor) -> Tensor:
        length = torch.Size(self.shape).numel() * self.dtype.itemsize
        return memory[self.begin :][:length].view(self.dtype).as_strided(self.shape, self.stride)


class PackedBatch(NamedTuple):
    """A batch with a `TensorLayout` in `memory`, (N,) uint8, for each of its tensors."""

    batch: Batch
    memory: Tensor


def pack(batch: Batch) -> PackedBatch:
    """Copy the batch's tensors, which must be dense, into one new piece of memory; shared memory in a loader worker."""
    size = 0
    places: Batch = {name: {} for name in batch}
    for name, part in batch.items():
        for key, value in part.items():
            if isinstance(value, Tensor):
                places[name][key] = TensorLayout(size, value.dtype, tuple(value.shape), value.stride())
                size += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
    memory = _allocate(size)
    for name, part in places.items():
        for key, place in part.items():
            place.view(memory).copy_(batch[name][key])
    return PackedBatch({name: part | places[name] for name, part in batch.items()}, memory)


def unpack(packed: PackedBatch) -> Batch:
    """Return the batch that was packed. Its tensors are views of the memory."""
    return {
        name: {
            key: value.view(packed.memory) if isinstance(value, TensorLayout) else value for key, value in part.items()
        }
        for name, part in packed.batch.items()
    }


def shared_bytes(
    config: DataConfig, *, micro_batch_size: int, num_held: int, noise: Mapping[str, tuple[int, ...]] | None = None
) -> int:
    """Return the most shared memory, in bytes, that a rank's workers take while the rank holds `num_held` batches.

    `noise`: as `TrainingStream` takes it.
    """
    height, width = config.crop_size
    sample = height * width * (3 + 1) + height + torch.int64.itemsize  # image, label, valid, number
    batch = 2 * (micro_batch_size * sample + 4 * ALIGNMENT)  # of two domains
    for shape in (noise or {}).values():
        batch += micro_batch_size * math.prod(shape) * torch.float32.itemsize + ALIGNMENT
    num_batches = NUM_AHEAD * config.num_workers + num_held
    return (num_batches * batch + (config.num_workers + 1) * LOCKS_BYTES) if config.num_workers else 0


def _allocate(size: int) -> Tensor:
    """Allocate (size,) uint8. In a loader worker it is shared memory, which spares the loader a copy."""
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    try:
        shared = torch.UntypedStorage._new_shared(size)  # as torch's own collate function does
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        what = f"no shared memory for a batch of {size:,} bytes (set fewer data.num_workers, or mount a larger one)"
        raise OSError(errno.ENOSPC, what, SHARED_MEMORY) from error
    return torch.empty(0, dtype=torch.uint8).set_(shared)
