"""The labelled images that a model is scored on: the validation sets, as whole images."""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from iccld.data.config import DataConfig
from iccld.data.sample import decode_pixels, decode_train_ids
from iccld.data.storage import integrity
from iccld.data.stream.domain import relabel
from iccld.data.stream.sets import OpenSet, open_sets


def num_validation_samples(config: DataConfig) -> int:
    """Count the samples of the validation sets."""
    return sum(len(part.positions) for part in open_sets(config, "validation", with_labels=True))


def read_validation(config: DataConfig, *, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Any]]:
    """Read this rank's part of the validation sets, as whole images: samples rank, rank + world_size, ...

    Yields `image` (H, W, 3) uint8 RGB, `labels` (H, W) uint8 class indices or 255, `key` and `number`. Ranks may
    differ by one image. Wrong settings raise at once, not at the first image. A bad sample always raises, since scores
    over fewer images would be other scores.
    """
    parts = open_sets(config, "validation", with_labels=True)
    numbers = range(rank, sum(len(part.positions) for part in parts), world_size)
    return _validation_samples(parts, config, numbers)


def read_validation_pairs(
    config: DataConfig, *, most: int, below: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Read this rank's part of at most `most` validation samples, each paired with the sample half of them further on.

    The samples are spread evenly over all, or over those numbered below `below`. A single sample is paired with None.
    The distance matters because neighbours may be similar frames of one clip. Samples are those of `read_validation`.
    """
    parts = open_sets(config, "validation", with_labels=True)
    total = sum(len(part.positions) for part in parts)
    total = min(total, below) if below else total
    count = min(most, total)
    spread = [i * total // count for i in range(count)]
    for i in range(rank, count, world_size):
        chosen = [spread[i], spread[(i + count // 2) % count]][: min(count, 2)]
        sample, other = [*_validation_samples(parts, config, chosen), None][:2]
        yield sample, other


def _validation_samples(parts: list[OpenSet], config: DataConfig, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    table = config.class_set.build().table()
    ends = list(itertools.accumulate(len(part.positions) for part in parts))
    for number in numbers:
        part = parts[at := bisect_right(ends, number)]
        position = int(part.positions[number - (ends[at - 1] if at else 0)])
        integrity.raise_damage()
        sample = part.reader.read(position, with_labels=True)
        try:
            image = decode_pixels(sample.image)
            labels = relabel(decode_train_ids(sample.label, image.shape[:2], num_classes=part.index.num_classes), table)
        except ValueError as error:
            raise part.reader.bad(position, f"it cannot be used: {error}") from error
        yield {"image": image, "labels": labels, "key": part.index.key(position), "number": number}
