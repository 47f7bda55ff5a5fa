"""A cache of what frozen networks give for a sample: computed once, read from then on.

    number n ── modulo num_samples ── image, crop, flip, partner, mix, strong view ── E, D ── kept
    number n ── timestep, noise ── never kept

All draws stay functions of position: with a cache, sample n looks as sample n modulo `num_samples` does (the stream's
`repeat_after` reads it so, and the stage draws its mix and its strong view so), and its timestep and its noise are
those of n. So training sees `num_samples` fixed views of each domain, again and again, under ever new noise.

An entry is what a whole micro-batch gives. `num_samples` is a multiple of the global batch size, so the numbers of a
micro-batch, taken modulo it, are those of one of the first micro-batches, on any number of ranks. What is read was
therefore computed in the very same batch, and what is computed is rounded as what is read: a step has the same bits
whether the cache is empty, partly filled or full, and a run may resume with any of them.
"""

import json
import struct
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from iccld import rng
from iccld.stages.base import sum_and_count
from iccld.stages.named import Tensors

FORMAT = 1
IS_HIT = "is_hit"
"""The name of a scalar beside the views: 1 if they were read, 0 if they were computed."""
_NOT_KEPT = {
    "full": "is used up: the other views are computed each time they are seen.",
    "too_large": "has no room for the views of a micro-batch, which may take a sixteenth of it: they are computed each "
    "time they are seen; raise it.",
}
"""Words about `max_gib` where the store did not keep views, by its counters."""
_OF_IMAGES = ("images", "labels", "valid", "keys")
_MAX_PENDING = 4
_ALIGNMENT = 16
_NUMBER = struct.Struct("<I")
_START = 2 * _NUMBER.size


class Store(Protocol):
    """Bytes by key, which may get lost at any time."""

    @property
    def counters(self) -> Mapping[str, int]: ...

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, data: bytes) -> None: ...

    def discard(self, key: str) -> None: ...


class ViewCache:
    """Cache of what `make` gives for a micro-batch: it reads it from the store, or computes and stores it.

    `identity` says what the views depend on besides the numbers: networks, settings, data. `report` is told once why
    the store keeps no more. fp32 is kept as fp16, all else unchanged.
    """

    def __init__(
        self, num_samples: int, store: Store, *, identity: str, report: Callable[[str], None] = lambda text: None
    ) -> None:
        self.num_samples, self.store, self.identity, self.report = num_samples, store, identity, report
        self._writer, self._pending = ThreadPoolExecutor(1, "view cache"), deque[Future[None]]()
        self._unsaid = {*_NOT_KEPT}

    def __deepcopy__(self, memo: Any) -> None:
        """Return None: a copy of a stage is made to count or to try, and must neither read nor write the cache."""

    def __call__(self, batch: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]) -> Tensors:
        """Return `make` of a micro-batch, on its device; its samples' numbers are taken modulo `num_samples`.

        The host waits neither for the device nor for a write; `raise_failures` says what a write has met.
        """
        self._collect()
        numbers, device = batch["source"]["numbers"] % self.num_samples, batch["source"]["images"].device
        key = f"{self.identity}/{len(numbers)}/{int(numbers[0])}"
        data = self.store.get(key)
        if data is not None:
            if _is_whole(data):
                return {IS_HIT: torch.ones((), device=device), **_unpack(data, device)}
            self.store.discard(key)
        # Without the noise that the stream draws for the true numbers: what a view needs of it is drawn for `numbers`.
        renumbered = {
            name: {part: domain[part] for part in _OF_IMAGES if part in domain} | {"numbers": numbers}
            for name, domain in batch.items()
        }
        kept = {name: _Kept(_rounded(tensor), tensor.dtype) for name, tensor in make(renumbered).items()}
        if len(self._pending) < _MAX_PENDING:
            copied = _to_host(kept, device)
            self._pending.append(self._writer.submit(self._write, key, *copied))
        views = {name: tensor.to(dtype, copy=True) for name, (tensor, dtype) in kept.items()}
        return {IS_HIT: torch.zeros((), device=device), **views}

    def raise_failures(self) -> None:
        """Raise what a write has met: ValueError for values that fp16 does not hold."""
        for write in self._pending:
            if write.done():
                write.result()

    def finish(self) -> None:
        """Wait until everything is written. Raises what a write has met."""
        while self._pending:
            self._pending.popleft().result()

    def _collect(self) -> None:
        while self._pending and self._pending[0].done() and self._pending[0].exception() is None:
            self._pending.popleft()

    def _write(self, key: str, kept: "dict[str, _Kept]", copied: Any) -> None:
        if copied is not None:
            torch.cuda.set_device(copied.device)  # of this thread, which else begins with the first GPU
            copied.synchronize()
        for name, (tensor, _) in kept.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"stage2.cache: {name} has values that are not finite, or that fp16 does not hold (above 65504); "
                    f"set stage2.cache.num_samples=0."
                )
        self.store.put(key, _pack(kept))
        for why in self._unsaid & {name for name in _NOT_KEPT if self.store.counters[name]}:
            self._unsaid.remove(why)
            self.report(f"stage2.cache.max_gib {_NOT_KEPT[why]}")


class _Kept(NamedTuple):
    """Stored tensor; it is read as `dtype`."""

    tensor: Tensor
    dtype: torch.dtype


def hit_metric(tensors: Tensors) -> Tensors:
    """Return the share of micro-batches that were found, if there is a cache."""
    return {"cache/hits": sum_and_count(tensors[IS_HIT], 1.0)} if IS_HIT in tensors else {}


def _rounded(tensor: Tensor) -> Tensor:
    """Copy a tensor, rounded as the store keeps it, in the same layout: networks that read it stay as fast."""
    return tensor.to(torch.float16 if tensor.dtype is torch.float32 else tensor.dtype, copy=True)


def _to_host(kept: dict[str, _Kept], device: torch.device) -> tuple[dict[str, _Kept], Any]:
    """Copy the tensors to the host; on CUDA, also return the event after which they are there."""
    if device.type != "cuda":
        return kept, None
    on_host = {}
    for name, (tensor, dtype) in kept.items():
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        on_host[name] = _Kept(host.copy_(tensor, non_blocking=True), dtype)
    copied = torch.cuda.Event(blocking=True)  # else the thread that waits for it keeps a core busy
    copied.record(torch.cuda.current_stream(device))
    return on_host, copied


def _pack(kept: Mapping[str, _Kept]) -> bytes:
    """Pack a checksum of all that follows, the header's length, the header, and the tensors, aligned to 16 bytes."""
    header, body = [], bytearray()
    for name, (tensor, dtype) in kept.items():
        order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
        dense = tensor.permute(order).contiguous()
        header.append([name, _name(tensor.dtype), _name(dtype), order, list(dense.shape)])
        body += dense.flatten().view(torch.uint8).numpy().data
        body += bytes(-tensor.nbytes % _ALIGNMENT)
    text = json.dumps(header).encode()
    text += b" " * (-(_START + len(text)) % _ALIGNMENT)
    whole = _NUMBER.pack(len(text)) + text + body
    return _NUMBER.pack(zlib.crc32(whole)) + whole


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_whole(data: bytes) -> bool:
    return len(data) > _START and _NUMBER.unpack_from(data)[0] == zlib.crc32(memoryview(data)[_NUMBER.size :])


def _unpack(data: bytes, device: torch.device) -> Tensors:
    """Unpack what `_pack` made to the device by one copy, in the dtypes that it is read as."""
    start = _START + _NUMBER.unpack_from(data, _NUMBER.size)[0]
    buffer = rng.to_device(torch.frombuffer(bytearray(memoryview(data)[start:]), dtype=torch.uint8), device)
    tensors, offset = {}, 0
    for name, kept_as, read_as, order, shape in json.loads(data[_START:start]):
        dtype = getattr(torch, kept_as)
        size = dtype.itemsize * torch.Size(shape).numel()
        dense = buffer[offset : offset + size].view(dtype).view(shape)
        tensors[name] = dense.permute([order.index(axis) for axis in range(len(order))]).to(getattr(torch, read_as))
        offset += size + -size % _ALIGNMENT
    return tensors
