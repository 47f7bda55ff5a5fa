"""Samples of one domain by their number: read, cropped, mapped to classes, and joined to micro-batches.

Photometric augmentation runs on the device, in `iccld.uda`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iccld import rng
from iccld.data.config import OnError
from iccld.data.images.decode import Window, decode_image
from iccld.data.sample import check_indexed_size, decode_train_ids
from iccld.data.storage.reader import BadSample, RawSample
from iccld.data.stream.order import Draw, Order
from iccld.data.stream.sets import OpenSet
from iccld.labels import IGNORE_INDEX
from iccld.strides import LATENT_STRIDE

MAX_REPLACEMENTS = 100
CROP_TRIES = 10
FULL_MERIT = 3
"""The highest score of `source_merit`."""

DomainBatch = dict[str, Any]
"""One domain's part of a micro-batch."""


@dataclass(frozen=True)
class CropRules:
    """Rules of a domain's crops: (height, width), the chance to be mirrored, and what a crop should show.

    A source crop is drawn again until no class fills more than `max_class_share` of it. If the sample was drawn for a
    class, the crop must also hold at least half of `wanted_pixels` (or of the pixels that the image has). Rows in the
    margins, which are fractions of the image's height, are not valid.
    """

    crop_size: tuple[int, int]
    flip_probability: float
    max_class_share: float = 1.0
    wanted_pixels: int = 0
    margin_top: float = 0.0
    margin_bottom: float = 0.0


class Crop(NamedTuple):
    """The window's first row and column in the image, and a flag that mirrors it left to right after cutting."""

    top: int
    left: int
    flip: bool


def check_crop_fits(part: OpenSet, crop_size: tuple[int, int]) -> None:
    """Refuse a crop that is larger than an image in use. Reads images' sizes only if the smallest is too small."""
    least = part.index.header.min_size
    if all(side <= limit for side, limit in zip(crop_size, least, strict=True)):
        return
    samples = part.index.samples[["height", "width"]]
    chosen = samples[: len(part.positions)] if isinstance(part.positions, range) else samples[part.positions]
    small = np.flatnonzero((chosen["height"] < crop_size[0]) | (chosen["width"] < crop_size[1]))
    if len(small):
        fits = [int(chosen[side].min()) // LATENT_STRIDE * LATENT_STRIDE for side in ("height", "width")]
        first = small[0]
        raise ValueError(
            f"data.crop_size={list(crop_size)} is larger than sample {part.index.key(int(part.positions[first]))!r} of "
            f"{part.index.location} ({chosen['height'][first]}x{chosen['width'][first]} pixels; {len(small)} of "
            f"{len(chosen)} samples are too small); use at most {fits}, or make the shards with a larger --size."
        )


def relabel(train_ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return `table[train_ids]` for a `(256,)` uint8 table. `bytes.translate` takes a tenth of NumPy's time."""
    mapped = bytearray(train_ids.tobytes()).translate(table.tobytes())
    return np.frombuffer(mapped, np.uint8).reshape(train_ids.shape)


def _copy(window: np.ndarray, out: Tensor, *, flip: bool) -> None:
    """Copy an `(H, W, ...)` window, mirrored left to right if asked. Torch mirrors several times faster than NumPy."""
    pixels = torch.from_numpy(window)
    out.copy_(torch.flip(pixels, [1]) if flip else pixels)


class DomainStream:
    """Samples of the source or the target. Everything about sample n is a function of (seed, name, n)."""

    def __init__(
        self,
        name: str,
        parts: Sequence[OpenSet],
        order: Order,
        *,
        seed: int,
        crop_rules: CropRules,
        table: np.ndarray | None,
        on_error: OnError = OnError["raise"],
        noise: Mapping[str, tuple[int, ...]] | None = None,
        repeat_after: int = 0,
    ) -> None:
        """`table` maps train ids to class indices (`ClassSet.table`); with None, labels are never read.

        `noise`: the shape of each kind of normal noise that is drawn for a sample; the batch holds it under that name.
        `repeat_after`: if above 0, sample n shows the image of sample n modulo this; its number and noise stay its own.
        """
        for part in parts:
            check_crop_fits(part, crop_rules.crop_size)
        self.name, self.parts, self.order, self.seed = name, list(parts), order, seed
        self.crop_rules, self.table, self.on_error, self.noise = crop_rules, table, on_error, noise or {}
        self.repeat_after = repeat_after

    def batch(self, numbers: Sequence[int]) -> DomainBatch:
        """Make the batch of the samples `numbers`; see `TrainingStream`. Raises BadSample unless they are replaced.

        The batch also has `replaced`: (key, shard, what was wrong) of every sample that was replaced.
        """
        height, width = self.crop_rules.crop_size
        images = torch.empty(len(numbers), height, width, 3, dtype=torch.uint8)
        labels = torch.empty(len(numbers), height, width, dtype=torch.uint8)
        valid = torch.empty(len(numbers), height, 1, dtype=torch.bool)
        bad: list[BadSample] = []
        read_as = [n % self.repeat_after if self.repeat_after else n for n in numbers]
        draws = [self.order[n] for n in read_as]
        fetched = self._fetch(draws)
        keys = [
            self._fill(n, draws[j], raw=fetched[j], bad=bad, outputs=(images[j], labels[j], valid[j]))
            for j, n in enumerate(read_as)
        ]
        batch: DomainBatch = {"images": images.permute(0, 3, 1, 2), "valid": valid, "keys": keys}
        batch["numbers"] = torch.tensor(list(numbers), dtype=torch.int64)
        if self.table is not None:
            batch["labels"] = labels
        for purpose, shape in self.noise.items():
            batch[purpose] = rng.normal(shape, seed=self.seed, purpose=purpose, numbers=batch["numbers"], device="cpu")
        return batch | {"replaced": [(sample.key, sample.shard, sample.what) for sample in bad]}

    def _fetch(self, draws: Sequence[Draw]) -> list[RawSample | BadSample]:
        """Read the encoded samples, or the error in place of a bad one, by one call to each set's reader."""
        fetched: dict[int, RawSample | BadSample] = {}
        for i, part in enumerate(self.parts):
            places = [j for j, draw in enumerate(draws) if draw.part == i]
            positions = [draws[j].index for j in places]
            fetched |= zip(places, part.reader.read_all(positions, with_labels=self.table is not None), strict=True)
        return [fetched[j] for j in range(len(draws))]

    def _fill(
        self,
        number: int,
        draw: Draw,
        *,
        raw: RawSample | BadSample,
        bad: list[BadSample],
        outputs: tuple[Tensor, ...],
    ) -> str:
        """Write sample `number`, or its replacement, into the batch, and return its key."""
        for attempt in range(MAX_REPLACEMENTS):
            if attempt:
                draw = self.order[number + attempt]
                raw = self._fetch([draw])[0]
            try:
                if isinstance(raw, BadSample):
                    raise raw
                self._decode_into(outputs, raw, draw, number)
            except BadSample as error:
                if self.on_error is OnError["raise"]:
                    raise
                bad.append(error)
            else:
                return self.parts[draw.part].index.key(draw.index)
        raise ValueError(f"{MAX_REPLACEMENTS} samples in a row are bad, the last: {bad[-1]}")

    def _decode_into(self, outputs: tuple[Tensor, ...], raw: RawSample, draw: Draw, number: int) -> None:
        """Decode the sample into the batch: image `(H, W, 3)`, labels `(H, W)`, valid `(H, 1)`."""
        image_out, labels_out, valid_out = outputs
        part, rules = self.parts[draw.part], self.crop_rules
        record = part.index.samples[draw.index]
        size = int(record["height"]), int(record["width"])
        try:
            check_indexed_size(raw.image, size)
            ids = None
            if self.table is not None:
                ids = decode_train_ids(raw.label, size, num_classes=part.index.num_classes)
            crop = draw_crop(
                size,
                rules.crop_size,
                flip_probability=rules.flip_probability,
                generator=rng.numpy_generator(self.seed, f"{self.name}/crop", number),
                merit=None if ids is None else self._merit(ids, draw),
            )
            image = decode_image(raw.image, window=Window(crop.top, crop.left, *rules.crop_size))
        except ValueError as error:
            raise part.reader.bad(draw.index, f"it cannot be used: {error}") from error
        _copy(image, image_out, flip=crop.flip)
        if ids is not None:
            _copy(self._labels(ids, crop), labels_out, flip=crop.flip)
        margins = {"margin_top": rules.margin_top, "margin_bottom": rules.margin_bottom}
        valid_out[:] = torch.from_numpy(valid_rows(size[0], crop, rules.crop_size[0], **margins))[:, None]

    def _labels(self, train_ids: np.ndarray, crop: Crop) -> np.ndarray:
        """Return the class indices of a crop's window, before mirroring."""
        assert self.table is not None
        return relabel(window_of(train_ids, crop, self.crop_rules.crop_size), self.table)

    def _merit(self, train_ids: np.ndarray, draw: Draw) -> Callable[[Crop], int] | None:
        """Return the function that scores a crop of this labelled image, or None if every crop is as good."""
        rules, wanted = self.crop_rules, draw.wanted_class
        if wanted is None and rules.max_class_share >= 1:
            return None
        pixels = self.parts[draw.part].index.samples["class_pixels"][draw.index]
        shown = 0 if wanted is None or self.table is None else int(pixels[self.table[: len(pixels)] == wanted].sum())
        return lambda crop: source_merit(
            self._labels(train_ids, crop),
            max_class_share=rules.max_class_share,
            wanted_class=wanted,
            wanted_pixels=max(min(rules.wanted_pixels, shown) // 2, 1),
        )


def draw_crop(
    image_size: tuple[int, int],
    crop_size: tuple[int, int],
    *,
    flip_probability: float,
    generator: np.random.Generator,
    merit: Callable[[Crop], int] | None = None,
) -> Crop:
    """Draw a crop uniformly. Sizes are (height, width); `flip_probability` is that of mirroring.

    With `merit`, up to 10 crops are drawn until one reaches FULL_MERIT; if none does, the first of the best is taken.
    """
    flipped = bool(generator.random() < flip_probability)
    best, best_merit = None, -1
    for _ in range(CROP_TRIES):
        top, left = (int(generator.integers(image_size[i] - crop_size[i] + 1)) for i in (0, 1))
        crop = Crop(top, left, flipped)
        value = FULL_MERIT if merit is None else merit(crop)
        if value > best_merit:
            best, best_merit = crop, value
        if best_merit >= FULL_MERIT:
            break
    assert best is not None
    return best


def source_merit(
    labels: np.ndarray, *, max_class_share: float, wanted_class: int | None = None, wanted_pixels: int = 1
) -> int:
    """Score a window of a labelled image: 2 if it shows the wanted class, plus 1 if no class fills it.

    `labels` is the window, (h, w) uint8. If no class is wanted, the 2 are given. Shares count labelled pixels only; a
    window without labelled pixels scores like one that a single class fills.
    """
    counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    shows = wanted_class is None or counts[wanted_class] >= wanted_pixels
    varied = counts.max() <= max_class_share * counts.sum() and counts.sum() > 0
    return 2 * int(shows) + int(varied)


def window_of(array: np.ndarray, crop: Crop, crop_size: tuple[int, int]) -> np.ndarray:
    """Return a view of the crop's window of an `(H, W, ...)` array, before mirroring: `(h, w, ...)`."""
    return array[crop.top : crop.top + crop_size[0], crop.left : crop.left + crop_size[1]]


def valid_rows(
    image_height: int, crop: Crop, crop_height: int, *, margin_top: float, margin_bottom: float
) -> np.ndarray:
    """Mark the rows of the window outside the image's margins: `(h,)` bool. Margins are fractions of its height."""
    rows = np.arange(crop.top, crop.top + crop_height)
    return (rows >= round(margin_top * image_height)) & (rows < image_height - round(margin_bottom * image_height))
