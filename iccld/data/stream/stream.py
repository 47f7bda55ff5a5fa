"""Endless stream of training batches.

    number n ── order ── sample i ── index ── bytes ── decode ── crop, flip ── micro-batch ── loader ── step

Everything to the right of n is a function of (seed, domain, n), so a stream starts at any step, for any number of
ranks and workers, and goes on as if it had never stopped.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from iccld.batch_layout import BatchLayout
from iccld.data.config import DataConfig
from iccld.data.processes import say
from iccld.data.storage import integrity
from iccld.data.stream.domain import CropRules, DomainStream
from iccld.data.stream.order import Order
from iccld.data.stream.sets import OpenSet, domain_order, open_sets
from iccld.data.stream.workers import (
    NUM_AHEAD,
    Batch,
    PackedBatch,
    deliveries_of,
    initialize_worker,
    pack,
    unpack,
    worker_context,
)
from iccld.outcome import plain

MIN_DRAWN = 1000


class TrainingStream:
    """Micro-batches of the source and, if one is configured, the target.

    A batch is `{"source": {...}, "target": {...}}`, each with

    - `images`: (B, 3, H, W) uint8 RGB, in channels-last memory
    - `labels`: (B, H, W) uint8 class indices or 255; for the target only with `target_labels`
    - `valid`: (B, H, 1) bool, False in the rows of the target's margins
    - `numbers`: (B,) int64 sample numbers, from which every later draw is keyed
    - `keys`: list of B names
    - in the source, normal noise `(B, *shape)` float32 under each purpose of `noise`

    `counters` sums up on this rank since the start: samples drawn and replaced; requests, retries and bytes of the
    storage; hits and misses of the cache.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        layout: BatchLayout,
        with_target: bool = True,
        target_labels: bool = False,
        noise: Mapping[str, tuple[int, ...]] | None = None,
        repeat_after: int = 0,
        report: Callable[[str], None] = say,
    ) -> None:
        """`noise`: the shape of each kind of noise that the loader's workers draw for a sample.

        `repeat_after`: in all domains, sample n shows image and labels of sample n modulo this; 0 turns it off.
        `report` is called once for each bad sample. Raises ValueError if a set cannot be used.
        """
        self.config, self.layout, self.report = config, layout, report
        self.class_set, self.repeat_after = config.class_set.build(), repeat_after
        self.domains = {"source": self._source(seed, noise)}
        if with_target and config.target.shards:
            self.domains["target"] = self._target(seed, target_labels)
        self._drawn = {f"{name}_{what}": 0 for name in self.domains for what in ("samples", "replaced")}
        self._transfers: dict[int, dict[str, int]] = {}
        self._reported: set[tuple[str, str]] = set()

    @property
    def counters(self) -> dict[str, int]:
        return _summed([self._drawn, *self._transfers.values()])

    def fingerprints(self) -> dict[str, Any]:
        """Return what a checkpoint remembers of the sets that it was trained on; their location is no part of it."""
        return {
            part.name: part.index.fingerprint() | part.used for domain in self.domains.values() for part in domain.parts
        }

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Yield this rank's micro-batches in order, from the first of `start_step` on, without end.

        Raises ValueError or OSError, in one line, if a batch cannot be made or too many samples are bad, and
        WorkerDied if a worker was killed. A script that reads with workers must guard its work by
        `if __name__ == "__main__":`.
        """
        loader = DataLoader(
            _MicroBatches(self.domains, self.layout, start_step),
            batch_size=None,
            num_workers=self.config.num_workers,
            worker_init_fn=initialize_worker,
            multiprocessing_context=worker_context(self.config.num_workers),
            prefetch_factor=NUM_AHEAD if self.config.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: starting a loader draws nothing from the global one
        )
        for delivery in deliveries_of(loader):
            integrity.raise_damage()
            if delivery.failure:
                raise delivery.failure
            self._transfers[delivery.worker] = delivery.transfers
            batch = unpack(delivery.packed)
            for name, part in batch.items():
                self._judge(name, len(part["keys"]), part.pop("replaced"))
                part["numbers"] = part["numbers"].clone()  # a view would keep the whole batch in memory
            yield batch

    def _judge(self, domain: str, num_samples: int, bad: list[tuple[str, str, str]]) -> None:
        """Count the samples of a micro-batch, report each bad one once, and raise if there are too many."""
        drawn = self._drawn
        drawn[f"{domain}_samples"] += num_samples
        drawn[f"{domain}_replaced"] += len(bad)
        for key, shard, what in bad:
            if (key, shard) not in self._reported:
                self._reported.add((key, shard))
                self.report(f"bad sample replaced: {shard}: {key!r}: {what}")
        count, total = drawn[f"{domain}_replaced"], drawn[f"{domain}_samples"]
        if count > self.config.max_bad_share * max(total, MIN_DRAWN):
            raise ValueError(
                f"{count} bad samples among {total} of the {domain} are more than data.max_bad_share="
                f"{self.config.max_bad_share} (of at least {MIN_DRAWN:,}); look at them with `iccld shards verify`, or "
                f"allow a larger share."
            )

    def _source(self, seed: int, noise: Mapping[str, tuple[int, ...]] | None) -> DomainStream:
        config = self.config
        rules = CropRules(self._crop_size(), config.flip, config.max_class_share, config.rare_class_min_pixels)
        parts = open_sets(config, "source", with_labels=True)
        order = domain_order(parts, config, seed=seed, rare_classes=config.rare_class_sampling)
        table = self.class_set.table()
        return self._stream("source", parts, order, seed=seed, crop_rules=rules, table=table, noise=noise)

    def _target(self, seed: int, with_labels: bool) -> DomainStream:
        config = self.config
        rules = CropRules(
            self._crop_size(),
            config.flip,
            margin_top=config.target_margin_top,
            margin_bottom=config.target_margin_bottom,
        )
        parts = open_sets(config, "target", with_labels=with_labels)
        order = domain_order(parts, config, seed=seed, rare_classes=False)
        table = self.class_set.table() if with_labels else None
        return self._stream("target", parts, order, seed=seed, crop_rules=rules, table=table)

    def _stream(self, name: str, parts: list[OpenSet], order: Order, **how: Any) -> DomainStream:
        return DomainStream(name, parts, order, on_error=self.config.on_error, repeat_after=self.repeat_after, **how)

    def _crop_size(self) -> tuple[int, int]:
        height, width = self.config.crop_size
        return height, width


class _Delivery(NamedTuple):
    """Message of a worker: a batch and the sums of its transfers, or the reason why it cannot make one.

    An exception raised in a worker would arrive as a traceback.
    """

    packed: PackedBatch
    worker: int
    transfers: dict[str, int]
    failure: Exception | None = None


class _MicroBatches(IterableDataset):
    """Data set of the loader: worker w of N makes the whole micro-batches w, w + N, ...; the loader alternates."""

    def __init__(self, domains: dict[str, DomainStream], layout: BatchLayout, start_step: int) -> None:
        self.domains, self.layout, self.start_step = domains, layout, start_step

    def __iter__(self) -> Iterator[_Delivery]:
        before = self._transfers()  # transfers before the first batch are not counted
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for position in itertools.count(self.start_step * self.layout.num_accumulation + first, stride):
            numbers = self.layout.numbers(*divmod(position, self.layout.num_accumulation))
            try:
                packed = pack({name: domain.batch(numbers) for name, domain in self.domains.items()})
            except (ValueError, OSError) as error:
                yield _Delivery(pack({}), first, {}, failure=plain(error))
                return
            except MemoryError:
                failure = OSError("a batch does not fit in memory; set a smaller micro-batch.")
                yield _Delivery(pack({}), first, {}, failure)
                return
            transfers = {name: count - before[name] for name, count in self._transfers().items()}
            yield _Delivery(packed, first, transfers)

    def _transfers(self) -> dict[str, int]:
        """Sum the counters of all storages and caches since this process began."""
        readers = [part.reader for domain in self.domains.values() for part in domain.parts]
        storages = [reader.storage for reader in readers]
        caches = {id(reader.cache): reader.cache for reader in readers if reader.cache}  # several sets may share one
        return _summed(
            [
                *({f"storage_{name}": count for name, count in storage.counters.items()} for storage in storages),
                *({f"cache_{name}": count for name, count in cache.counters.items()} for cache in caches.values()),
            ]
        )


def _summed(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sum counters by name. Unlike a sum of `Counter`s it keeps zeros, so that all ranks have the same names."""
    total: dict[str, int] = {}
    for each in counters:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total
