"""Check of an index against its checksums: once for each process that opens it, on one rank of each node.

A small index is checked before it is used. A large one is checked beside the work, since reading a billion records
takes minutes; damage then ends the run at its next batch (`raise_damage`).
"""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from iccld.data.deflate import crc32
from iccld.data.storage.index import ARRAY_FILES, HEADER_FILE, IndexHeader, ShardIndex

AT_ONCE_BYTES = 256 << 20
SHARE_BESIDE = 0.1
"""The share of one core's time that a check beside the work may take."""
_PIECE_BYTES = 4 << 20
_begun: set[tuple[Any, ...]] = set()
_damage: list[str] = []


def ensure(index: ShardIndex) -> None:
    """Check an index that this process has not checked yet. Raises ValueError if a small one is damaged."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # another rank of this node does it
        return
    files = [index.folder / name for name in (*ARRAY_FILES, HEADER_FILE)]
    version = tuple((str(path), status.st_ino, status.st_ctime_ns) for path in files for status in [path.stat()])
    if version in _begun:
        return
    if sum(path.stat().st_size for path in files) <= AT_ONCE_BYTES:
        check(index)
    else:
        threading.Thread(target=_check_beside, args=(index,), name="index check", daemon=True).start()
    _begun.add(version)


def raise_damage() -> None:
    """Raise ValueError if a check beside the work has found damage."""
    if _damage:
        raise ValueError(_damage[0])


def check(index: ShardIndex) -> None:
    """Check the files of an index. Raises ValueError, naming file and remedy, if they differ from its header."""
    for path, what in faults(index):
        raise ValueError(f"{path}: {what}; {index.remedy}.")


def faults(index: ShardIndex, *, share: float = 1.0) -> Iterator[tuple[Path, str]]:
    """Yield each file that differs from the header, and how. Reads all files, using `share` of a core's time."""
    totals = Totals()
    for name, array in zip(ARRAY_FILES, (index.shards, index.samples, index.classes), strict=True):
        path, checksum = index.folder / name, 0
        for number, piece in enumerate(_pieces(path, array, share)):
            checksum = crc32(piece, checksum)
            if number and array is index.samples:
                totals.add(np.frombuffer(piece, array.dtype))
        if checksum != index.header.checksums[name]:
            yield path, f"it is not what {HEADER_FILE} says (checksum)"
            return
    for name in totals.differing(index.header):
        yield index.folder / HEADER_FILE, f"its {name} is not that of samples.npy"


def _check_beside(index: ShardIndex) -> None:
    try:
        for path, what in faults(index, share=SHARE_BESIDE):
            if index.is_copy:
                path.unlink(missing_ok=True)  # so the next start fetches it again
            _damage.append(f"{path}: {what}; {index.remedy}.")
    except (ValueError, OSError) as error:
        _damage.append(str(error))


def _pieces(path: Path, array: np.ndarray, share: float) -> Iterator[bytes]:
    """Yield the file in pieces: what is before the records, then whole records."""
    size = max(1, _PIECE_BYTES // array.dtype.itemsize) * array.dtype.itemsize
    with path.open("rb") as file:
        yield file.read(array.offset if isinstance(array, np.memmap) else size)
        while True:
            began = time.monotonic()
            piece = file.read(size)
            if not piece:
                return
            yield piece
            time.sleep((1 / share - 1) * (time.monotonic() - began))


@dataclass
class Totals:
    """Totals over the added samples, as the header must state them."""

    num_bytes: int = 0
    has_labels: bool = True
    min_size: list[int] = field(default_factory=lambda: [1 << 32, 1 << 32])
    max_size: list[int] = field(default_factory=lambda: [0, 0])
    class_pixels: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    class_samples: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, records: np.ndarray) -> None:
        """Count records of `sample_dtype`."""
        sides = [records[side] for side in ("height", "width")]
        self.num_bytes += sum(int(records[f"{kind}_size"].sum(dtype=np.int64)) for kind in ("image", "label"))
        self.has_labels &= bool((records["label_size"] > 0).all())
        self.min_size = [min(least, int(side.min())) for least, side in zip(self.min_size, sides, strict=True)]
        self.max_size = [max(most, int(side.max())) for most, side in zip(self.max_size, sides, strict=True)]
        self.class_pixels = self.class_pixels + records["class_pixels"].sum(0, dtype=np.int64)
        self.class_samples = self.class_samples + (records["class_pixels"] > 0).sum(0)

    def differing(self, header: IndexHeader) -> Iterator[str]:
        """Yield the names of the totals that differ from the header."""
        for name, total in vars(self).items():
            if getattr(header, name) != (total.tolist() if isinstance(total, np.ndarray) else total):
                yield name
