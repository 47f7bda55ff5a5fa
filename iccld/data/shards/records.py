"""Records of an index: one sample's from its bytes, a set's from the parts that workers leave on the disk."""

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iccld.data.shards.tars import LEAVE_OUT, Place, Problem
from iccld.data.storage.index import (
    ARRAY_FILES,
    HEADER_FILE,
    INDEX_FOLDER,
    NUM_TRAIN_IDS,
    ShardIndex,
    sample_dtype,
    shard_dtype,
    write_index,
)
from iccld.durable import create, holds_only, scratch_folder, sync

_AT_ONCE = 1 << 20
"""The most records that are held in memory together."""


def make_record(
    key: str, places: tuple[Place, Place], data: tuple[bytes, bytes], facts: tuple[int, int, np.ndarray], shard: int
) -> tuple[Any, ...]:
    """Return the fields of `sample_dtype`: places and bytes of image and label, and the results of `examine`."""
    image, label = places
    height, width, class_pixels = facts
    return shard, *image, *label, height, width, zlib.crc32(data[0]), zlib.crc32(data[1]), class_pixels, key.encode()


def to_array(records: Sequence[tuple[Any, ...]], *, num_classes: int) -> np.ndarray:
    """Return the records as an array of `sample_dtype`, as narrow as their keys allow."""
    return np.array(records, sample_dtype(max((len(record[-1]) for record in records), default=1), num_classes))


def join_records(parts: Iterable[tuple[int, Path]], target: Path) -> np.ndarray:
    """Join the records of the .npy files `parts`, in order, into an array that is mapped from the file `target`.

    A part comes with the number of its first shard, which is added to the shard numbers in it.
    """
    parts = list(parts)
    loaded = (_load(path) for _, path in parts)
    shapes = [(len(part), part.dtype["key"].itemsize, part.dtype["class_pixels"].shape[0]) for part in loaded]
    total = sum(count for count, _, _ in shapes)
    dtype = sample_dtype(
        max((width for _, width, _ in shapes), default=1), max((k for *_, k in shapes), default=NUM_TRAIN_IDS)
    )
    if not total:
        return np.empty(0, dtype)
    target.unlink(missing_ok=True)  # left by an interrupted attempt
    create(target).close()
    samples, start = np.lib.format.open_memmap(target, "w+", dtype, (total,)), 0
    for first, path in parts:
        part = _load(path)
        samples[start : start + len(part)] = part
        samples["shard"][start : start + len(part)] += np.uint32(first)
        start += len(part)
    return samples


def _load(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def without_conflicts(samples: np.ndarray, shards: Sequence[Path]) -> tuple[np.ndarray, list[Problem]]:
    """Return the samples that fit together, moved to the front of their array, and the problems of the others.

    Others are samples without labels, if some have labels, and those whose key an earlier sample has. Memory holds 25
    bytes a sample.
    """
    owners, whats = _repeated_keys(samples), dict[int, str]()
    for position, owner in owners.items():
        whats[position] = f"its key is also in {shards[samples['shard'][owner]].name}"
    labelled = np.concatenate([block["label_size"] > 0 for _, block in blocks(samples)] or [np.empty(0, bool)])
    if labelled.any():
        what = f"it has no label, but {int(labelled.sum())} of {len(samples)} samples have one"
        whats |= {int(position): what for position in np.flatnonzero(~labelled)}
    problems = [_conflict(samples[position], whats[position], shards) for position in sorted(whats)]
    keep = np.ones(len(samples), bool)
    keep[list(whats)] = False
    end = 0
    for start, block in blocks(samples):
        kept = block[keep[start : start + len(block)]]
        samples[end : end + len(kept)] = kept
        end += len(kept)
    return samples[:end], problems


def _conflict(record: np.void, what: str, shards: Sequence[Path]) -> Problem:
    remedy = f"label all samples or none, and give each a key of its own, {LEAVE_OUT}"
    return Problem(str(shards[record["shard"]]), what, remedy, record["key"].decode())


def _repeated_keys(samples: np.ndarray) -> dict[int, int]:
    """Map the positions of samples whose key an earlier one has to the position of that one."""
    hashes = [np.fromiter(map(hash, block["key"].tolist()), np.int64, len(block)) for _, block in blocks(samples)]
    if not hashes:
        return {}
    hashed = np.concatenate(hashes)
    order = np.argsort(hashed, kind="stable")
    candidates = np.flatnonzero(hashed[order[1:]] == hashed[order[:-1]])
    firsts, repeated = dict[bytes, int](), dict[int, int]()
    for position in np.unique(order[np.union1d(candidates, candidates + 1)]).tolist():
        key = bytes(samples["key"][position])
        if firsts.setdefault(key, position) != position:
            repeated[position] = firsts[key]
    return repeated


def blocks(samples: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Divide the records into pieces that fit into memory, each with the position of its first record."""
    return ((start, samples[start : start + _AT_ONCE]) for start in range(0, len(samples), _AT_ONCE))


def finish_index(
    folder: Path,
    samples: np.ndarray,
    *,
    shards: Sequence[Path],
    dataset: str,
    settings: Mapping[str, Any] | None,
    classes: Mapping[str, Any] | None = None,
) -> ShardIndex:
    """Write the index of `shards`, which lie in `folder`, whole or not at all, and open it."""
    ours = holds_only("|".join(map(re.escape, (HEADER_FILE, *ARRAY_FILES))))
    temporary = scratch_folder(folder / INDEX_FOLDER, is_ours=ours)
    records = [(shard.name.encode(), shard.stat().st_size) for shard in shards]
    tars = np.array(records, shard_dtype(max(len(name) for name, _ in records)))
    write_index(temporary, dataset=dataset, shards=tars, samples=samples, settings=settings, classes=classes)
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    temporary.rename(folder / INDEX_FOLDER)
    sync(folder)
    return ShardIndex.open(folder)
