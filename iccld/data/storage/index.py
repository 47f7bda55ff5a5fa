"""The index of a set of tars: where each sample's bytes lie, how large it is, which classes it shows.

It lies beside the shards, is written last (a set without an index is not finished), and is memory-mapped, so that a
billion samples cost no memory:

    index/index.json    IndexHeader: counts and totals
    index/shards.npy    `shard_dtype` records: the tars
    index/samples.npy   `sample_dtype` records: the samples, in the order of the tars
    index/classes.npy   uint32: for each class in turn, the samples that show it, those with most pixels first

The ids in the labels are Cityscapes train ids, or, where the header lists `classes` (version 3), indices of these.
"""

import json
import tokenize
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from iccld.data.deflate import crc32
from iccld.data.storage.files import kind_of
from iccld.durable import create, write_whole
from iccld.labels import CITYSCAPES_19, ClassSet, own_class_set
from iccld.reading import MIB, parse_json, read_limited

FORMAT_VERSION = 2
OWN_CLASSES_VERSION = 3
"""Version of sets that list their classes, which earlier programs cannot read; other sets keep theirs."""
NUM_TRAIN_IDS = CITYSCAPES_19.num_classes
INDEX_FOLDER = "index"
HEADER_FILE = "index.json"
ARRAY_FILES = ("shards.npy", "samples.npy", "classes.npy")
MAX_HEADER_BYTES = 64 * MIB
MAX_COUNT = 1 << 62
MAX_TEXT_BYTES = 4096
"""The most bytes of a key and of a shard's name in a record."""
MAX_NPY_HEADER_BYTES = 1 << 16
NPY_FAULTS = (OSError, ValueError, TypeError, OverflowError, SyntaxError, MemoryError, RecursionError, EOFError)
"""Errors that numpy raises for a file that is no array, besides tokenize.TokenError."""
MAKE_IT = "make the shards with `iccld shards make`, or index tars made elsewhere with `iccld shards index`"


def sample_dtype(key_width: int, num_classes: int = NUM_TRAIN_IDS) -> np.dtype:
    """Return one sample's record; offsets and sizes are bytes in the shard. Without a label, label_size is 0."""
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
            ("class_pixels", np.uint32, (num_classes,)),
            ("key", f"S{max(key_width, 1)}"),
        ]
    )


def shard_dtype(name_width: int) -> np.dtype:
    """Return one tar's record: its file name and its size in bytes."""
    return np.dtype([("name", f"S{max(name_width, 1)}"), ("size", np.uint64)])


@dataclass(frozen=True)
class IndexHeader:
    """Content of `index.json`: everything that is asked of a set before its first sample is read.

    `min_size` and `max_size` are [height, width], each side's extreme over all samples. `class_pixels` and
    `class_samples` count, for each class, pixels and the samples that show it. `checksums` are CRC-32 of the arrays'
    files. `classes` are the set's own: `names`, `colors`, `rare` and `things` of `own_class_set`; empty: Cityscapes.
    """

    dataset: str
    num_samples: int
    num_shards: int
    num_bytes: int
    has_labels: bool
    min_size: list[int]
    max_size: list[int]
    class_pixels: list[int]
    class_samples: list[int]
    checksums: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION
    classes: dict[str, Any] = field(default_factory=dict)

    @property
    def class_set(self) -> ClassSet:
        """Return the classes that the ids in the labels stand for."""
        return own_class_set(**self.classes) if self.classes else CITYSCAPES_19


@dataclass(frozen=True)
class ShardIndex:
    """An opened index: read-only memory maps of its arrays. `location` is the set's folder or URL."""

    location: str
    folder: Path
    header: IndexHeader
    shards: np.ndarray
    samples: np.ndarray
    classes: np.ndarray

    @classmethod
    def open(cls, location: str | Path, *, setting: str = "shards", folder: Path | None = None) -> "ShardIndex":
        """Open the index of the set at `location`; errors call it by `setting`.

        `folder` holds the index's files if they are not in `location`/index: a remote set's copy. Raises ValueError if
        they are missing or do not fit each other.
        """
        where = f"{setting}={location}"
        if folder is None:
            if not Path(location).is_dir():
                raise ValueError(f"{where}: there is no such folder; {MAKE_IT}.")
            folder = Path(location) / INDEX_FOLDER
        path = folder / HEADER_FILE
        if not path.is_file():
            raise ValueError(f"{where}: {path} is missing, so the shards are not finished; {MAKE_IT}.")
        header = parse_header(read_limited(path, MAX_HEADER_BYTES), f"{where}: {path}")
        remedy = remedy_of(location, folder)
        arrays = [_mapped(folder / name, header, where, remedy) for name in ARRAY_FILES]
        if not header.num_samples:
            raise ValueError(f"{where}: the set is empty; {MAKE_IT}.")
        return cls(str(location), folder, header, *arrays)

    def __len__(self) -> int:
        return self.header.num_samples

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the files itself, instead of sending it the records."""
        return _reopen, (self.location, self.folder, self.header.checksums)

    @property
    def remedy(self) -> str:
        """Say what to do if its files are damaged."""
        return remedy_of(self.location, self.folder)

    @property
    def is_copy(self) -> bool:
        """Tell whether its files are this node's copies of a remote set's."""
        return self.folder != Path(self.location) / INDEX_FOLDER

    @property
    def num_classes(self) -> int:
        return len(self.header.class_pixels)

    def key(self, position: int) -> str:
        return self.samples["key"][position].decode(errors="replace")

    def shard_name(self, shard: int) -> str:
        if shard >= len(self.shards):
            raise ValueError(
                f"{self.folder}: a sample is said to be in shard {shard} of {len(self.shards)}; {self.remedy}."
            )
        return self.shards["name"][shard].decode(errors="replace")

    def samples_with(self, train_id: int) -> np.ndarray:
        """Return the positions of the samples that show `train_id`, `(M,)` uint32, most pixels first."""
        start = sum(self.header.class_samples[:train_id])
        return self.classes[start : start + self.header.class_samples[train_id]]

    def fingerprint(self) -> dict[str, Any]:
        """Return the facts by which a run notices that its data changed: any byte of any sample changes them.

        The checksums are those of the header, which `integrity` compares with the bytes.
        """
        checksum = zlib.crc32(json.dumps(self.header.checksums, sort_keys=True).encode())
        return {"dataset": self.header.dataset, "num_samples": len(self), "index": f"{checksum:08x}"}


def _reopen(location: str, folder: Path, checksums: Mapping[str, int]) -> ShardIndex:
    index = ShardIndex.open(location, folder=folder)
    if index.header.checksums != checksums:
        raise ValueError(f"{folder}: the set was indexed anew while it was in use; give the same command again.")
    return index


def parse_header(text: bytes, where: str) -> IndexHeader:
    """Parse an `index.json`. Raises ValueError, which names `where`, for anything else."""
    try:
        content = parse_json(text, "it")
        version = content.get("version")
        header = IndexHeader(**content) if version in (FORMAT_VERSION, OWN_CLASSES_VERSION) else None
        if header and not _is_sound(header):
            raise TypeError("its numbers do not fit each other")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged ({str(error)[:200]}); remove the index and {MAKE_IT}.") from error
    if header is None:
        raise ValueError(
            f"{where} has version {str(version)[:20]}, this program reads {FORMAT_VERSION} and {OWN_CLASSES_VERSION}; "
            f"remove the index and {MAKE_IT}."
        )
    return header


def _is_sound(header: IndexHeader) -> bool:
    counts = [header.num_samples, header.num_shards, header.num_bytes, *header.class_pixels, *header.class_samples]
    counts += [*header.min_size, *header.max_size]
    return (
        all(type(count) is int and 0 <= count < MAX_COUNT for count in counts)
        and all(type(checksum) is int and 0 <= checksum < 1 << 32 for checksum in header.checksums.values())
        and type(header.classes) is dict
        and bool(header.classes) == (header.version == OWN_CLASSES_VERSION)
        and len(header.class_pixels) == len(header.class_samples) == header.class_set.num_classes
        and all(count <= header.num_samples for count in header.class_samples)
        and len(header.min_size) == len(header.max_size) == 2
        and set(header.checksums) == set(ARRAY_FILES)
        and [type(value) for value in (header.dataset, header.has_labels, header.settings)] == [str, bool, dict]
    )


def array_kinds(header: IndexHeader) -> dict[str, tuple[np.dtype, int]]:
    """Return the fields of each array's records, with the narrowest possible texts, and the number of records."""
    dtypes = (shard_dtype(1), sample_dtype(1, len(header.class_pixels)), np.dtype(np.uint32))
    lengths = (header.num_shards, header.num_samples, sum(header.class_samples))
    return dict(zip(ARRAY_FILES, zip(dtypes, lengths, strict=True), strict=True))


def array_bytes(header: IndexHeader) -> dict[str, range]:
    """Return the least and the greatest number of bytes that each array's file may have."""
    return {
        name: range(
            length * dtype.itemsize,
            length * (dtype.itemsize + (MAX_TEXT_BYTES if dtype.names else 0)) + MAX_NPY_HEADER_BYTES + 1,
        )
        for name, (dtype, length) in array_kinds(header).items()
    }


def remedy_of(location: str | Path, folder: Path) -> str:
    """Say what to do if an index is damaged: the remedy depends on whether it is a copy of a remote set's."""
    if folder != Path(location) / INDEX_FOLDER:
        return f"remove {folder}, a copy that is fetched anew"
    return f"restore it, or remove {folder}/ and index the set again"


def _mapped(path: Path, header: IndexHeader, where: str, remedy: str) -> np.ndarray:
    dtype, length = array_kinds(header)[path.name]
    why = "it has other fields or another length"
    try:
        _check_file(path, array_bytes(header)[path.name])
        array = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
        if isinstance(array, np.ndarray) and array.shape == (length,) and _alike(array.dtype, dtype):
            head = array.offset if isinstance(array, np.memmap) else path.stat().st_size
            if array.dtype.itemsize <= dtype.itemsize + MAX_TEXT_BYTES and path.stat().st_size == head + array.nbytes:
                return array
            why = "its records have another width"
    except (*NPY_FAULTS, tokenize.TokenError) as error:
        why = " ".join(str(error).split())[:200]
    raise ValueError(f"{where}: {path} does not fit {HEADER_FILE} ({why}); {remedy}.")


def _check_file(path: Path, sizes: range) -> None:
    if (kind := kind_of(path)) != "a file":
        raise ValueError(f"it is {kind}, no file")
    if (size := path.stat().st_size) not in sizes:
        raise ValueError(f"it has {size:,} bytes, so another length")


def _alike(one: np.dtype, other: np.dtype) -> bool:
    """Tell whether two records have the same fields; texts may differ in their width."""
    if not one.names or not other.names:
        return one == other or one.kind == other.kind == "S"
    return one.names == other.names and all(_alike(one[name], other[name]) for name in one.names)


def rank_samples(class_pixels: np.ndarray) -> list[np.ndarray]:
    """Rank the rows of `(N, K)` pixel counts: for each column the rows that are not 0, uint32, the largest first.

    Rows with equal counts keep their order.
    """
    ranked = []
    for pixels in np.asarray(class_pixels).T:
        rows = np.flatnonzero(pixels)
        ranked.append(rows[np.argsort(-pixels[rows].astype(np.int64), kind="stable")].astype(np.uint32))
    return ranked


def write_index(
    folder: Path,
    *,
    dataset: str,
    shards: np.ndarray,
    samples: np.ndarray,
    settings: Mapping[str, Any] | None = None,
    classes: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of an index into `folder`, which exists and is not yet named `index` (see `build_index`).

    `shards` and `samples` are arrays of `shard_dtype` and `sample_dtype`, or memory maps of them. Memory holds the
    content of `classes.npy` and 12 bytes a sample. `classes`: see `IndexHeader`.
    """
    ranked = rank_samples(samples["class_pixels"])
    arrays = dict(zip(ARRAY_FILES, (shards, samples, np.concatenate(ranked)), strict=True))
    for name, array in arrays.items():
        with create(folder / name) as file:
            np.save(file, array, allow_pickle=False)
    sizes = [[int(reduce(samples[side], initial=0)) for side in ("height", "width")] for reduce in (_least, np.max)]
    header = IndexHeader(
        dataset=dataset,
        num_samples=len(samples),
        num_shards=len(shards),
        num_bytes=int(samples["image_size"].sum(dtype=np.int64) + samples["label_size"].sum(dtype=np.int64)),
        has_labels=bool(len(samples)) and bool((samples["label_size"] > 0).all()),
        min_size=sizes[0],
        max_size=sizes[1],
        class_pixels=samples["class_pixels"].sum(0, dtype=np.int64).tolist(),
        class_samples=[len(rows) for rows in ranked],
        checksums={name: file_crc32(folder / name) for name in arrays},
        settings=dict(settings or {}),
        version=OWN_CLASSES_VERSION if classes else FORMAT_VERSION,
        classes=dict(classes or {}),
    )
    content = {name: value for name, value in asdict(header).items() if name != "classes" or value}
    write_whole(folder / HEADER_FILE, json.dumps(content, indent=2) + "\n")


def _least(sides: np.ndarray, initial: int) -> int:
    return int(sides.min()) if len(sides) else initial


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a file, read in pieces."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            checksum = crc32(piece, checksum)
    return checksum
