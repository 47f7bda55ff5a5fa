"""Nested batches of tensors, copied to the device: while a step computes on one, the next is being copied."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
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


def prefetch(
    batches: Iterator[Any],
    device: torch.device,
    *,
    copying: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Any]:
    """Yield the batches in order, with their tensors on `device` except those that stay on the host (`map_tensors`).

    On CUDA, one batch is taken ahead of the one handed out, and the host waits for no copy from pinned memory. An error
    while it is taken is raised when its turn comes. `copying` surrounds each copy.
    """
    if device.type == "cpu":
        yield from batches
        return
    if device.type != "cuda":
        yield from (map_tensors(batch, lambda tensor: tensor.to(device)) for batch in batches)
        return
    stream = torch.cuda.Stream(device)

    def copy(batch: Any) -> tuple[Any, Any]:
        with torch.cuda.stream(stream):
            with copying():
                copied = map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
            return copied, stream.record_event()

    def keep(tensor: Tensor) -> None:
        """Keep the tensor's memory, which is the copying stream's, from being reused while the step still reads it."""
        tensor.record_stream(torch.cuda.current_stream(device))

    for batch, copied in one_ahead(map(copy, batches)):
        torch.cuda.current_stream(device).wait_event(copied)
        map_tensors(batch, keep)
        yield batch


def one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the same items, each taken before the one in front of it is handed out; it fails when its turn comes."""

    def take() -> Any:
        try:
            return next(items)
        except Exception as error:  # raised when its turn comes
            return error

    ahead = take()
    while not isinstance(ahead, Exception):
        current, ahead = ahead, take()
        yield current
    if not isinstance(ahead, StopIteration):
        raise ahead
