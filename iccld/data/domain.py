"""One domain's samples by their number: read, cropped, mapped to classes, and put together to micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from iccld import rng
from iccld.data.augment import Crop, apply_crop, draw_crop, source_merit, valid_rows
from iccld.data.index import NUM_TRAIN_IDS, ShardIndex
from iccld.data.order import Draw, Order
from iccld.data.reader import ShardReader
from iccld.labels import ClassSet

STRIDE = 8
"""Of the latent: crops are multiples of it."""

MicroBatch = dict[str, Any]


@dataclass(frozen=True)
class View:
    """How samples are looked at: the crop's (height, width), the chance to mirror it, and what it is to show.

    Source crops are drawn until no class fills more than `max_class_share` of them and, for a sample that was drawn
    for a class, until at least half of `wanted_pixels` (or of what the image has) are in it. Rows in the margins,
    fractions of the image's height, are not valid.
    """

    crop_size: tuple[int, int]
    flip: float
    max_class_share: float = 1.0
    wanted_pixels: int = 0
    margin_top: float = 0.0
    margin_bottom: float = 0.0


def class_pixels(index: ShardIndex, class_set: ClassSet) -> np.ndarray:
    """The pixels of each class in each sample: `(N, K)` float64."""
    member = np.zeros((NUM_TRAIN_IDS, class_set.num_classes))
    for train_id, class_index in class_set.of_train_id.items():
        member[train_id, class_index] = 1
    return index.samples["class_pixels"] @ member


def check_crop_fits(index: ShardIndex, crop_size: tuple[int, int]) -> None:
    """Refuses a crop that is larger than any image of the set."""
    heights, widths = index.samples["height"], index.samples["width"]
    small = np.flatnonzero((heights < crop_size[0]) | (widths < crop_size[1]))
    if len(small):
        first, fits = small[0], [int(sides.min()) // STRIDE * STRIDE for sides in (heights, widths)]
        raise ValueError(
            f"data.crop_size={list(crop_size)} is larger than sample {index.key(first)!r} of {index.folder} "
            f"({heights[first]}x{widths[first]} pixels; {len(small)} of {len(index)} samples are too small); "
            f"use at most {fits}, or make the shards with a larger --size."
        )


def relabel(train_ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table[train_ids]` for a `(256,)` uint8 table; on images, `bytes.translate` takes a tenth of NumPy's time."""
    mapped = train_ids.astype(np.uint8, copy=False).tobytes().translate(table.tobytes())
    return np.frombuffer(bytearray(mapped), np.uint8).reshape(train_ids.shape)


class DomainStream:
    """The samples of the source or the target: everything about sample n is a function of (seed, name, n)."""

    def __init__(
        self, name: str, index: ShardIndex, order: Order, *, seed: int, view: View, table: np.ndarray | None
    ) -> None:
        """`table`, `(256,)` uint8, maps train ids to class indices; with None, labels are never read."""
        check_crop_fits(index, view.crop_size)
        self.name, self.order, self.seed, self.view, self.table = name, order, seed, view, table
        self.reader = ShardReader(index)

    def batch(self, numbers: Sequence[int]) -> MicroBatch:
        """The samples `numbers` as images, labels (if read), valid, numbers and keys; see `TrainingStream`."""
        height, width = self.view.crop_size
        images = np.empty((len(numbers), 3, height, width), np.uint8)
        labels = np.empty((len(numbers), height, width), np.uint8)
        valid = np.empty((len(numbers), height, width), np.bool_)
        keys = [self._fill(n, images[j], labels[j], valid[j]) for j, n in enumerate(numbers)]
        batch = {"images": torch.from_numpy(images), "valid": torch.from_numpy(valid), "keys": keys}
        batch["numbers"] = torch.tensor(list(numbers), dtype=torch.int64)
        if self.table is not None:
            batch["labels"] = torch.from_numpy(labels)
        return batch

    def _fill(self, number: int, image_out: np.ndarray, labels_out: np.ndarray, valid_out: np.ndarray) -> str:
        """Writes sample `number` into its place in the batch and returns its key."""
        view, draw = self.view, self.order[number]
        image, train_ids = self.reader.read(draw.index, with_labels=self.table is not None)
        labels = None if self.table is None or train_ids is None else relabel(train_ids, self.table)
        crop = draw_crop(
            (image.shape[0], image.shape[1]),
            view.crop_size,
            flip=view.flip,
            generator=rng.numpy_generator(self.seed, f"{self.name}/crop", number),
            merit=None if labels is None else self._merit(labels, draw),
        )
        image_out[:] = apply_crop(image, crop, view.crop_size).transpose(2, 0, 1)
        if labels is not None:
            labels_out[:] = apply_crop(labels, crop, view.crop_size)
        margins = {"margin_top": view.margin_top, "margin_bottom": view.margin_bottom}
        valid_out[:] = valid_rows(image.shape[0], crop, view.crop_size[0], **margins)[:, None]
        return self.reader.index.key(draw.index)

    def _merit(self, labels: np.ndarray, draw: Draw) -> Callable[[Crop], int] | None:
        """What makes a crop of this labelled image good, if anything."""
        view, wanted = self.view, draw.wanted_class
        if wanted is None and view.max_class_share >= 1:
            return None
        pixels = 1 if wanted is None else min(view.wanted_pixels, int(np.count_nonzero(labels == wanted))) // 2
        return lambda crop: source_merit(
            apply_crop(labels, crop, view.crop_size),
            max_class_share=view.max_class_share,
            wanted_class=wanted,
            wanted_pixels=max(pixels, 1),
        )
