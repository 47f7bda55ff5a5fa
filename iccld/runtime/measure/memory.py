"""Memory of a rank: what there is, what each part of a training holds, and a record of running out of it."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iccld.durable import make_folder, replacing_by_name, write_whole
from iccld.outcome import lacks_memory
from iccld.reading import GIB, MIB
from iccld.runtime.measure import host_memory
from iccld.runtime.settings import MemoryConfig
from iccld.runtime.tensors import bytes_of, local_tensor

UNCLEAR = "could not create a primitive"  # oneDNN, which has no memory for the code of a kernel, or has no such kernel
ASKED = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    if lacks_memory(error) or isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and UNCLEAR in str(error) and not host_memory.free_memory()


def total_memory(device: torch.device) -> int:
    """Return all memory in bytes; on a CPU, the limit that bounds this process most."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory.total_memory()


def free_memory(device: torch.device, *, num_sharing: int) -> int:
    """Return the bytes that this rank may still take.

    `num_sharing`: ranks on this host, which share its memory if they run on its CPU.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory.free_memory(num_sharing=num_sharing)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes taken since `restart_peak`, by PyTorch's allocator on the device or from the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return host_memory.peak_memory()


def taken_memory(device: torch.device) -> int:
    """Return what `peak_memory` would be if nothing more were taken."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else host_memory.taken_memory()


def restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        host_memory.restart_peak()


@contextlib.contextmanager
def limited(device: torch.device, limit: int) -> Iterator[None]:
    """Limit PyTorch's allocator on CUDA to so many bytes within the block."""
    total = total_memory(device)
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def record_history(device: torch.device, config: MemoryConfig) -> None:
    if config.history and device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)


Parts = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by the part of the training that they are."""


@dataclass(frozen=True)
class OutOfMemory:
    """Facts known when an allocation failed; all sizes are in bytes."""

    asked: str
    peak: int
    total: int
    parts: dict[str, int]

    @classmethod
    def of(cls, error: BaseException, parts: Parts, device: torch.device) -> "OutOfMemory":
        found = ASKED.search(str(error))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory(device)
        held = {name: sum(map(bytes_of, tensors.values())) for name, tensors in parts.items()}
        held["activations and the rest"] = max(peak - sum(held.values()), 0)
        return cls(_readable(found[1]) if found else "more", peak, total_memory(device), held)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in self.parts.items() if size)
        return f"asked for {self.asked}; at its peak it held {gib(self.peak)} of {gib(self.total)} ({parts})"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / MIB:.1f} MiB"


def _readable(asked: str) -> str:
    return gib(int(asked.split()[0])) if asked.endswith("bytes") else asked


def write_snapshot(stem: Path, parts: Parts, facts: Mapping[str, Any]) -> Path:
    """Write a snapshot and return its file: on CUDA the allocator's, for pytorch.org/memory_viz.

    On a CPU it lists the tensors of the parts, largest first, as JSON.
    """
    make_folder(stem.parent, within=stem.parent.parent)
    if torch.cuda.is_available():
        path = stem.with_suffix(".pickle")
        with replacing_by_name(path) as scratch:
            torch.cuda.memory._dump_snapshot(str(scratch))
        return path
    tensors = [
        {"part": part, "name": name, "shape": list(local_tensor(t).shape), "dtype": str(t.dtype), "bytes": bytes_of(t)}
        for part, of_part in parts.items()
        for name, t in of_part.items()
    ]
    tensors.sort(key=lambda tensor: -tensor["bytes"])
    path = stem.with_suffix(".json")
    write_whole(path, json.dumps({**facts, "process": host_memory.status_lines(), "tensors": tensors}, indent=1))
    return path
