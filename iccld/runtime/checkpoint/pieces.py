"""Stored form of state, whatever the engine and the number of ranks: runs of flattened, named tensors.

A rank's file is a safetensors file that holds one run a tensor, under `NAME@START`. The manifest's table says where
each run lies: `{NAME: {"shape": [...], "dtype": "float32", "pieces": [[file, start, stop], ...]}}`. A reader takes the
elements that it needs, from whichever files hold them.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iccld.durable import create
from iccld.runtime.checkpoint.dtypes import SAFETENSORS_CODES
from iccld.runtime.checkpoint.errors import DamagedError

# The names of safetensors' header; https://github.com/huggingface/safetensors#format
SAFETENSORS_DTYPES = {getattr(torch, name): code for name, code in SAFETENSORS_CODES.items()}


class Run(NamedTuple):
    """The elements `start` to `start + len(data)` of a flattened tensor of `shape`. `data`: 1-D, any device."""

    shape: tuple[int, ...]
    start: int
    data: Tensor


def whole(tensor: Tensor) -> Run:
    """Return all of a tensor, as one run."""
    return Run(tuple(tensor.shape), 0, tensor.detach().reshape(-1))


def share_out(runs: Mapping[str, Run], *, rank: int, world_size: int) -> dict[str, Run]:
    """Return this rank's part of runs that all ranks hold alike: about as many elements a rank, large tensors split."""
    total = sum(len(run.data) for run in runs.values())
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    mine, offset = {}, 0
    for name in sorted(runs):
        run = runs[name]
        start, stop = max(first - offset, 0), min(last - offset, len(run.data))
        if start < stop or (len(run.data) == 0 and rank == 0):
            mine[name] = Run(run.shape, run.start + start, run.data[start:stop])
        offset += len(run.data)
    return mine


def write_runs(path: Path, runs: Mapping[str, Run]) -> dict[str, Any]:
    """Write host runs as a safetensors file, durably; return its `size`, `sha256` and `tensors` (see `join_tables`)."""
    header: dict[str, Any] = {}
    table: dict[str, Any] = {}
    offset = 0
    for name, run in runs.items():
        size = run.data.numel() * run.data.element_size()
        header[f"{name}@{run.start}"] = {
            "dtype": SAFETENSORS_DTYPES[run.data.dtype],
            "shape": [len(run.data)],
            "data_offsets": [offset, offset + size],
        }
        dtype = str(run.data.dtype).removeprefix("torch.")
        pieces = [[path.name, run.start, run.start + len(run.data)]]
        table[name] = {"shape": list(run.shape), "dtype": dtype, "pieces": pieces}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with create(path) as file, ThreadPoolExecutor(1) as other:
        for block in (len(text).to_bytes(8, "little"), text, *(_bytes(run.data) for run in runs.values())):
            hashed = other.submit(digest.update, block)
            file.write(block)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest(), "tensors": table}


def _bytes(data: Tensor) -> memoryview:
    # numpy's arrays are buffers, though their stubs do not say so
    return memoryview(data.contiguous().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def join_tables(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the tables of several ranks' files. Raises ValueError if runs overlap or leave a gap."""
    joined: dict[str, Any] = {}
    for table in tables:
        for name, entry in table.items():
            known = joined.setdefault(name, {**entry, "pieces": []})
            if (known["shape"], known["dtype"]) != (entry["shape"], entry["dtype"]):
                raise ValueError(f"{name} has shape {entry['shape']} on one rank and {known['shape']} on another.")
            known["pieces"].extend(entry["pieces"])
    for name, entry in joined.items():
        entry["pieces"].sort(key=lambda piece: (piece[1], piece[2]))
        end = 0
        for _, start, stop in entry["pieces"]:
            if start != end:
                raise ValueError(f"{name} is stored up to element {end} and from element {start}.")
            end = stop
        if end != math.prod(entry["shape"]):
            raise ValueError(f"{name} is stored up to element {end} of {math.prod(entry['shape'])}.")
    return joined


class TensorReader:
    """Reads the tensors of a checkpoint's folder by name, whole or in part."""

    def __init__(self, folder: Path, table: Mapping[str, Any]) -> None:
        self.folder, self.table = folder, table
        self._files: dict[str, Any] = {}

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self.table if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read the elements `start` to `stop` of the flattened tensor, on the host."""
        entry = self._entry(name)
        result = torch.empty(stop - start, dtype=getattr(torch, entry["dtype"]))
        for file, first, last in entry["pieces"]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                result[low - start : high - start] = self._part(f"{name}@{first}", file, low - first, high - first)
        return result

    def _part(self, run: str, file: str, low: int, high: int) -> Tensor:
        try:
            part = self._open(file).get_slice(run)[low:high]
        except (SafetensorError, RuntimeError, IndexError) as error:  # its checksum may be a stranger's, too
            raise DamagedError(f"checkpoint {self.folder} is damaged: {file} holds no {run} ({error}).") from error
        if part.shape != (high - low,):
            raise DamagedError(f"checkpoint {self.folder} is damaged: {file} holds too little of {run}.")
        return part

    def tensor(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).view(shape)

    def fill(self, name: str, run: Run) -> None:
        """Copy the stored elements into a run of a tensor of the same name and shape."""
        if run.shape != self.shape(name):
            raise ValueError(f"{self.folder}: {name} has shape {self.shape(name)}, not {run.shape}.")
        run.data.copy_(self.read(name, run.start, run.start + len(run.data)))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Read all whole tensors under `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names(prefix)}

    def _entry(self, name: str) -> Mapping[str, Any]:
        if name not in self.table:
            raise ValueError(f"{self.folder} holds no {name}; it is of another model or of other settings.")
        return self.table[name]

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]
