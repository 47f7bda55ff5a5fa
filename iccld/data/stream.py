"""The endless stream of training batches, and the labelled images that a model is scored on.

    number n ── order ── sample i ── index ── bytes ── decode ── crop, flip ── micro-batch ── loader ── step

Everything to the right of n is a function of (seed, domain, n), so a stream starts at any step, for any number of
ranks and workers, and goes on as if it had never stopped.
"""

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from iccld.data.config import BatchLayout, DataConfig, open_dataset
from iccld.data.domain import DomainStream, MicroBatch, View, class_pixels, relabel
from iccld.data.index import ShardIndex
from iccld.data.order import EpochOrder, Order, RareClassOrder
from iccld.data.reader import ShardReader
from iccld.data.workers import initialize_worker

Batch = dict[str, MicroBatch]


class TrainingStream:
    """Micro-batches of the source and, where one is configured, the target.

    A batch is `{"source": {...}, "target": {...}}`, each with

    - `images`: (B, 3, H, W) uint8 RGB
    - `labels`: (B, H, W) uint8 class indices or 255; for the target only with `target_labels`
    - `valid`: (B, H, W) bool, False in the target's margins
    - `numbers`: (B,) int64 sample numbers, from which every later draw is keyed
    - `keys`: list of B names
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        layout: BatchLayout,
        with_target: bool = True,
        target_labels: bool = False,
    ) -> None:
        self.config, self.layout = config, layout
        self.class_set = config.class_set.build()
        self.domains = {"source": self._source(seed)}
        if with_target and config.target.shards:
            self.domains["target"] = self._target(seed, target_labels)

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """This rank's micro-batches in order, from the first of `start_step` on, without end."""
        loader = DataLoader(
            _MicroBatches(self.domains, self.layout, start_step),
            batch_size=None,
            num_workers=self.config.num_workers,
            worker_init_fn=initialize_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that starting a loader draws nothing from the global one
        )
        for batch in loader:
            if isinstance(batch, _Failure):
                raise ValueError(batch.message)
            yield batch

    def _source(self, seed: int) -> DomainStream:
        config = self.config
        index = open_dataset(config.source, "source", with_labels=True)
        order: Order = EpochOrder(len(index), seed=seed, stream="source")
        if config.rare_class_sampling:
            order = RareClassOrder(
                class_pixels(index, self.class_set),
                seed=seed,
                stream="source",
                temperature=config.rare_class_temperature,
                min_pixels=config.rare_class_min_pixels,
            )
        view = View(self._crop_size(), config.flip, config.max_class_share, config.rare_class_min_pixels)
        return DomainStream("source", index, order, seed=seed, view=view, table=self.class_set.table())

    def _target(self, seed: int, with_labels: bool) -> DomainStream:
        config = self.config
        index = open_dataset(config.target, "target", with_labels=with_labels)
        view = View(
            self._crop_size(),
            config.flip,
            margin_top=config.target_margin_top,
            margin_bottom=config.target_margin_bottom,
        )
        table = self.class_set.table() if with_labels else None
        order = EpochOrder(len(index), seed=seed, stream="target")
        return DomainStream("target", index, order, seed=seed, view=view, table=table)

    def _crop_size(self) -> tuple[int, int]:
        height, width = self.config.crop_size
        return height, width


@dataclass(frozen=True)
class _Failure:
    """What a worker hands over instead of a batch it cannot make; raised there, it would arrive as a traceback."""

    message: str


class _MicroBatches(IterableDataset):
    """Worker w of N makes the micro-batches w, w + N, ..., whole; the loader hands them out in turn."""

    def __init__(self, domains: dict[str, DomainStream], layout: BatchLayout, start_step: int) -> None:
        self.domains, self.layout, self.start_step = domains, layout, start_step

    def __iter__(self) -> Iterator[Batch | _Failure]:
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for position in itertools.count(self.start_step * self.layout.num_accumulation + first, stride):
            numbers = self.layout.numbers(*divmod(position, self.layout.num_accumulation))
            try:
                yield {name: domain.batch(numbers) for name, domain in self.domains.items()}
            except ValueError as error:
                yield _Failure(str(error))
                return


def read_validation(config: DataConfig, *, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Any]]:
    """This rank's part of the validation set, whole images: samples rank, rank + world_size, ...

    Yields `image` (H, W, 3) uint8 RGB, `labels` (H, W) uint8 class indices or 255, `key` and `number`. Ranks may get
    one image more or less than others. What is wrong with the settings is raised at once, not at the first image.
    """
    index = open_dataset(config.validation, "validation", with_labels=True)
    return _validation_samples(index, config.class_set.build().table(), range(rank, len(index), world_size))


def _validation_samples(index: ShardIndex, table: np.ndarray, numbers: range) -> Iterator[dict[str, Any]]:
    reader = ShardReader(index)
    for number in numbers:
        image, train_ids = reader.read(number, with_labels=True)
        assert train_ids is not None
        yield {"image": image, "labels": relabel(train_ids, table), "key": index.key(number), "number": number}
