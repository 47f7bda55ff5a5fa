"""Sets that make up a domain: each is opened where it lies, cut down to the wanted samples, and put in order."""

import math
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iccld.data.config import DataConfig, DatasetConfig, OnError, SetConfig
from iccld.data.storage import integrity
from iccld.data.storage.base import MissingShard, Storage
from iccld.data.storage.cache import SampleCache
from iccld.data.storage.index import ShardIndex, rank_samples
from iccld.data.storage.open import open_storage
from iccld.data.storage.open_index import open_index
from iccld.data.storage.reader import ShardReader
from iccld.data.stream.order import EpochOrder, MixedOrder, Order, RareClassOrder, SubsetOrder
from iccld.redact import without_secrets
from iccld.texts import read_text

MAX_CHECKED_SHARDS = 1000
_KEYS_AT_ONCE = 1_000_000
_kept: list[dict[str, list["OpenSet"]]] = []  # one dictionary for each `sets_kept_open` block that has not ended


@dataclass(frozen=True)
class OpenSet:
    """One set of a domain. `positions` are the samples in use; `name` is the key of their order.

    `setting` is where the settings name the set, for instance `data.source`.
    """

    name: str
    reader: ShardReader
    positions: Sequence[int] | np.ndarray
    weight: float
    setting: str

    @property
    def index(self) -> ShardIndex:
        return self.reader.index

    @property
    def used(self) -> dict[str, int]:
        """Return what a run remembers of the samples in use, if it does not use all."""
        if len(self.positions) == len(self.index):
            return {}
        positions = self.positions
        checksum = 0 if isinstance(positions, range) else zlib.crc32(np.asarray(positions, np.int64).tobytes())
        return {"num_used": len(positions), "used": checksum}


def open_sets(config: DataConfig, role: str, *, with_labels: bool) -> list[OpenSet]:
    """Open the sets of the `role` "source", "target" or "validation". The first is keyed by `role`, others by name.

    Within `sets_kept_open`, sets that are open are handed out again. Raises ValueError if one is missing, damaged, or
    lacks labels that are needed.
    """
    dataset: DatasetConfig = getattr(config, role)
    if not dataset.shards:
        raise ValueError(f"data.{role}.shards is empty, but a {role} set is needed; set it to a folder of shards.")
    key = repr((role, dataset, config.storage, config.cache, config.on_error))
    parts = _kept[-1].get(key) if _kept else None
    if parts is None:
        parts = _open_all(config, role, dataset)
        if _kept:
            _kept[-1][key] = parts
    for part in parts if with_labels else ():
        _check_labels(part, role, config)
    return list(parts)


@contextmanager
def sets_kept_open() -> Iterator[None]:
    """Open each set once within the block, and keep it open: index and shards stay those that were checked.

    A verb opens the block for its process, since its checks, streams, scoring and pictures open the same sets and know
    nothing of each other.
    """
    _kept.append({})
    try:
        yield
    finally:
        _kept.pop()


def _open_all(config: DataConfig, role: str, dataset: DatasetConfig) -> list[OpenSet]:
    cache = SampleCache(config.cache) if config.cache.folder else None
    sets: dict[str, SetConfig] = {"": dataset} | dict(sorted(dataset.also.items()))
    return [_open_set(part, role, name, config, cache) for name, part in sets.items()]


def _open_set(part: SetConfig, role: str, name: str, config: DataConfig, cache: SampleCache | None) -> OpenSet:
    setting = f"data.{role}.also.{name}" if name else f"data.{role}"
    storage = open_storage(part.shards, config.storage)
    index = open_index(storage, part.shards, setting=f"{setting}.shards", cache_folder=config.cache.folder)
    integrity.ensure(index)
    if config.on_error is OnError["raise"] and storage.is_local and index.header.num_shards <= MAX_CHECKED_SHARDS:
        _check_shards(index, storage, f"{setting}.shards={part.shards}")
    reader = ShardReader(index, storage, None if storage.is_local else cache)
    return OpenSet(f"{role}/{name}" if name else role, reader, _positions(part, index, setting), part.weight, setting)


def _check_labels(part: OpenSet, role: str, config: DataConfig) -> None:
    where, header = f"{part.setting}.shards={without_secrets(part.index.location)}", part.index.header
    if not header.has_labels:
        raise ValueError(
            f"{where} has no labels, but the labels of the {role} set are needed; make the shards without --no-labels."
        )
    own, wanted = header.class_set.names, config.class_set.build().id_names
    if own != wanted:
        remedy = "set data.classes to the YAML that they were made with, or " if header.classes else ""
        raise ValueError(
            f"{where} has labels of {len(own)} classes ({_first(own)}), the run is of {len(wanted)} "
            f"({_first(wanted)}); {remedy}make them again with the run's --classes."
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _check_shards(index: ShardIndex, storage: Storage, where: str) -> None:
    for shard in range(len(index.shards)):
        name, expected = index.shard_name(shard), int(index.shards["size"][shard])
        try:
            size = storage.size(name)
        except MissingShard as error:
            raise ValueError(
                f"{where}: {error}, but the index names it; restore it, or index the set again."
            ) from error
        if size != expected:
            raise ValueError(
                f"{where}: {storage.describe(name)} has {size} bytes, its index says {expected}; restore it, or index "
                f"the set again."
            )


def _positions(part: SetConfig, index: ShardIndex, setting: str) -> range | np.ndarray:
    positions = range(math.ceil(len(index) * part.first_percent / 100))
    return _positions_of_keys(part.keys, index, len(positions), setting) if part.keys else positions


def _positions_of_keys(path: str, index: ShardIndex, num_samples: int, setting: str) -> np.ndarray:
    """Find the positions, among the first `num_samples`, of the keys in a file with one key a line."""
    where = f"{setting}.keys={path}"
    lines = {line for line in read_text(Path(path), where).splitlines() if line.strip()}
    found = _find(index, {spelling for line in lines for spelling in (line, line.strip())}, num_samples)
    there = set(index.samples["key"][found].tolist())
    # An editor may have put blanks around a key; they count only if a key of the set has just these.
    wanted = {line if line.encode() in there else line.strip() for line in lines}
    missing = sorted(key for key in wanted if key.encode() not in there)
    if missing or not wanted:
        names = ", ".join(missing[:3]) or "no key at all"
        raise ValueError(
            f"{where}: {len(missing)} of its {len(wanted)} keys are not in {index.location} ({names}); "
            f"write them as `iccld shards info --keys` does."
        )
    return found if len(there) == len(wanted) else _find(index, wanted, num_samples)


def _find(index: ShardIndex, keys: Collection[str], num_samples: int) -> np.ndarray:
    """Return the ascending positions of the keys that are among the first `num_samples`."""
    wanted = np.array([key.encode() for key in keys], np.bytes_)
    found = [
        start + np.flatnonzero(np.isin(index.samples["key"][start : min(start + _KEYS_AT_ONCE, num_samples)], wanted))
        for start in range(0, num_samples, _KEYS_AT_ONCE)
    ]
    return np.concatenate([np.empty(0, np.int64), *found]).astype(np.int64)


def domain_order(parts: Sequence[OpenSet], config: DataConfig, *, seed: int, rare_classes: bool) -> Order:
    """Build the order of a domain: each set's own order, by epochs or by rare classes, and their mixture."""
    orders = [
        _rare_order(part, config, seed)
        if rare_classes
        else _in_whole_set(EpochOrder(len(part.positions), seed=seed, stream=part.name), part)
        for part in parts
    ]
    if len(orders) == 1:
        return orders[0]
    return MixedOrder(orders, [part.weight for part in parts], seed=seed, stream=parts[0].name)


def _rare_order(part: OpenSet, config: DataConfig, seed: int) -> Order:
    """Build the order by rare classes. Class counts come from the index or, for chosen keys, are gathered here."""
    index, class_set = part.index, config.class_set.build()
    class_pixels, totals = index.samples["class_pixels"], np.array(index.header.class_pixels)
    if isinstance(part.positions, range):
        images_with = [index.samples_with(train_id) for train_id in range(index.num_classes)]
    else:
        class_pixels = class_pixels[part.positions]
        images_with, totals = rank_samples(class_pixels), class_pixels.sum(0, dtype=np.int64)
    members = [[t for t, c in class_set.of_train_id.items() if c == own] for own in range(class_set.num_classes)]
    order = RareClassOrder(
        class_pixels,
        images_with,
        totals=totals,
        members=members,
        seed=seed,
        stream=part.name,
        temperature=config.rare_class_temperature,
        min_pixels=config.rare_class_min_pixels,
        rare=class_set.rare,
        num_images=len(part.positions),
    )
    return _in_whole_set(order, part)


def _in_whole_set(order: Order, part: OpenSet) -> Order:
    """Turn positions among the used samples into positions in the set."""
    return order if isinstance(part.positions, range) else SubsetOrder(order, part.positions)
