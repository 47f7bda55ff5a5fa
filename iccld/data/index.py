"""The index of a folder of tars: where each sample's bytes lie, how large it is, which classes it shows.

It lies beside the shards as `index/index.json` and `index/samples.npy`, the latter memory-mapped. It can be built for
tars that anyone made, and is written last: a folder without an index is not finished.
"""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from iccld.labels import CITYSCAPES_19

FORMAT_VERSION = 1
NUM_TRAIN_IDS = CITYSCAPES_19.num_classes
_MAKE = "make the shards with `iccld shards make`, or index tars made elsewhere with iccld.data.indexing.build_index"


def sample_dtype(key_width: int) -> np.dtype:
    """One sample's record; offsets and sizes are bytes in the shard, a sample without label has label_size 0."""
    return np.dtype(
        [
            ("shard", np.uint32),
            ("image_offset", np.uint64),
            ("image_size", np.uint32),
            ("label_offset", np.uint64),
            ("label_size", np.uint32),
            ("height", np.uint32),
            ("width", np.uint32),
            ("image_checksum", np.uint32),
            ("label_checksum", np.uint32),
            ("class_pixels", np.uint32, (NUM_TRAIN_IDS,)),
            ("key", f"S{max(key_width, 1)}"),
        ]
    )


@dataclass(frozen=True)
class ShardFile:
    """A tar's name and size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class IndexHeader:
    """What `index.json` holds."""

    dataset: str
    shards: list[ShardFile]
    num_samples: int
    has_labels: bool
    image_extension: str
    label_extension: str
    settings: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class ShardIndex:
    """An opened index. `samples` is a read-only memory map of `sample_dtype` records."""

    folder: Path
    header: IndexHeader
    samples: np.ndarray

    @classmethod
    def open(cls, folder: str | Path, *, setting: str = "shards") -> "ShardIndex":
        """Opens the index of `folder`; `setting` is the name under which errors call it."""
        folder = Path(folder)
        where = f"{setting}={folder}"
        if not folder.is_dir():
            raise ValueError(f"{where}: there is no such folder; {_MAKE}.")
        header = _read_header(folder, where)
        for shard in header.shards:
            _check_shard(folder / shard.name, shard.size, where)
        samples = _load_samples(folder, header, where)
        if not len(samples):
            raise ValueError(f"{where}: the set is empty; {_MAKE}.")
        return cls(folder, header, samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file itself, instead of being sent the records."""
        return ShardIndex.open, (self.folder,)

    def key(self, index: int) -> str:
        return self.samples["key"][index].decode()


def _load_samples(folder: Path, header: IndexHeader, where: str) -> np.ndarray:
    path, why = folder / "index" / "samples.npy", "it has other fields or another number of samples"
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
        if samples.dtype.names == sample_dtype(1).names and len(samples) == header.num_samples:
            return samples
    except (OSError, ValueError) as error:
        why = str(error)
    raise ValueError(f"{where}: {path} does not fit index.json ({why}); remove {path.parent} and {_MAKE}.")


def _read_header(folder: Path, where: str) -> IndexHeader:
    path = folder / "index" / "index.json"
    if not path.is_file():
        raise ValueError(f"{where}: {path} is missing, so the shards are not finished; {_MAKE}.")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{where}: {path} is not a whole index ({error}); remove {path.parent} and {_MAKE}."
        ) from error
    if fields.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{where}: {path} is of version {fields.get('version')}, this program reads version {FORMAT_VERSION}; "
            f"remove {path.parent} and {_MAKE}."
        )
    return IndexHeader(**{**fields, "shards": [ShardFile(**shard) for shard in fields["shards"]]})


def _check_shard(path: Path, size: int, where: str) -> None:
    if not path.is_file():
        raise ValueError(f"{where}: {path} is missing, but its index names it; restore it, or {_MAKE}.")
    if path.stat().st_size != size:
        raise ValueError(
            f"{where}: {path} has {path.stat().st_size} bytes, its index says {size}; restore it, or remove the "
            f"index and {_MAKE}."
        )


def fingerprint(index: ShardIndex) -> dict[str, Any]:
    """What a checkpoint remembers of the set that it was trained on; where the shards lie is no part of it."""
    shards = [(shard.name, shard.size) for shard in index.header.shards]
    digest = zlib.crc32(json.dumps(shards).encode())
    return {"dataset": index.header.dataset, "num_samples": len(index), "shards": f"{digest:08x}"}
