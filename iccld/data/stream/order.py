"""Order of the samples: sample n is a pure function of (seed, stream, n), in constant time, without shuffled lists."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from iccld import rng

_MASK = (1 << 64) - 1
_NUM_ROUND_PAIRS = 4
_MIXTURE_BLOCK = 10_000
_NUM_PROBES, _ENOUGH_SHARE, _IMAGES_AT_ONCE = 1024, 1 / 32, 1 << 20
_MAX_DRAWS = 100_000
_DAMAGED = "the index is damaged: look at the set with `iccld shards verify`"


@dataclass(frozen=True)
class Draw:
    """A drawn sample: its `index` in the set, and the `wanted_class` that it was drawn for, if any.

    `part` is the number of the set in a mixture.
    """

    index: int
    wanted_class: int | None = None
    part: int = 0


class Order(Protocol):
    """Map from a sample number (0, 1, 2, ... over the whole run) to a sample of the set."""

    def __getitem__(self, number: int) -> Draw: ...


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


class Permutation:
    """A keyed bijection of `range(size)`: a Feistel network over the cells of a grid, in O(1) memory.

    Rows and columns are shifted in turn, each by a keyed hash of the other. The grid has up to `2 * sqrt(size)` cells
    too many. A value that lands on one of them is mapped again until it lies inside (cycle walking). Of 5 or 6 elements
    some orders come up to 2.4 times as often as they should; from 12 on, positions and neighbours are uniform.
    """

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, not {size}.")
        self.size = size
        self._num_rows = math.isqrt(size - 1) + 1
        self._num_columns = -(-size // self._num_rows)
        keys = [_mix(key + i * 0x9E3779B97F4A7C15) for i in range(2 * _NUM_ROUND_PAIRS)]
        self._rounds = list(zip(keys[::2], keys[1::2], strict=True))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"{position} is outside of range({self.size})")
        value = self._forward(position)
        while value >= self.size:
            value = self._forward(value)
        return value

    def _forward(self, cell: int) -> int:
        row, column = divmod(cell, self._num_columns)
        for row_key, column_key in self._rounds:
            row = (row + _mix(column ^ row_key)) % self._num_rows
            column = (column + _mix(row ^ column_key)) % self._num_columns
        return row * self._num_columns + column


class EpochOrder:
    """Order in which every sample comes once an epoch, each epoch in its own keyed permutation."""

    def __init__(self, size: int, *, seed: int, stream: str) -> None:
        self.size, self.seed, self.stream = size, seed, stream

    def __getitem__(self, number: int) -> Draw:
        epoch, position = divmod(number, self.size)
        permutation = Permutation(self.size, rng.key(self.seed, f"{self.stream}/epoch", epoch))
        return Draw(permutation[position], None)


def rare_class_probabilities(class_pixels: np.ndarray, *, temperature: float) -> np.ndarray:
    """Return P(c) ∝ exp((1 - f_c) / T) over the classes that occur (DAFormer, eq. 12); `f_c` is c's share of pixels.

    `class_pixels` is `(K,)`, counts or shares in any unit; the result is `(K,)` float64, 0 for an absent class.
    """
    pixels = np.asarray(class_pixels, np.float64)
    scores = -pixels / max(pixels.sum(), 1.0e-300) / temperature
    weights = np.where(pixels > 0, np.exp(scores - scores[pixels > 0].max(initial=-np.inf)), 0.0)
    return weights / max(weights.sum(), 1.0e-300)


class RareClassOrder:
    """Order that draws a class, rare ones more often, and then, uniformly, an image that shows it.

    An image shows a class if it has more than `min_pixels` of one of the class's train ids. If no image of the set has
    that many, one pixel is enough. Memory does not grow with the set.
    """

    def __init__(
        self,
        class_pixels: np.ndarray,
        images_with: Sequence[np.ndarray],
        *,
        totals: np.ndarray,
        members: Sequence[Sequence[int]],
        seed: int,
        stream: str,
        temperature: float = 0.01,
        min_pixels: int = 3000,
        num_images: int | None = None,
        rare: Sequence[int] = (),
    ) -> None:
        """`class_pixels`, `(N, T)`, counts the pixels of each train id in each image; `totals`, `(T,)`, holds the sums.

        `images_with[t]` lists the images that show train id t, those with most pixels first (`index.rank_samples`).
        `members[c]` lists the train ids that make up class c. Only the first `num_images` are drawn (None: all); the
        classes' shares are those of all images. Classes in `rare` are drawn as often as the rarest. Raises ValueError
        if no class occurs.
        """
        self.seed, self.stream = seed, stream
        limit = len(class_pixels) if num_images is None else num_images
        images = [_ClassImages(class_pixels, images_with, train_ids, min_pixels, limit) for train_ids in members]
        occurring = np.array([sum(totals[t] for t in ids) for ids in members]) * [len(each) > 0 for each in images]
        self.probabilities = rare_class_probabilities(_as_rarest(occurring, rare), temperature=temperature)
        self._classes = np.flatnonzero(self.probabilities)
        if not len(self._classes):
            raise ValueError(
                f"data.rare_class_sampling: no image of the {stream} set has a labelled pixel of any class; "
                f"check the labels and data.class_set, or set data.rare_class_sampling=false."
            )
        self._cumulative = np.cumsum(self.probabilities[self._classes])
        self._images = [images[int(c)] for c in self._classes]

    def __getitem__(self, number: int) -> Draw:
        generator = rng.numpy_generator(self.seed, f"{self.stream}/rare_class", number)
        drawn = int(np.searchsorted(self._cumulative, generator.random(), side="right"))
        drawn = min(drawn, len(self._classes) - 1)  # rounding may leave the last sum just below 1
        return Draw(self._images[drawn].draw(generator), int(self._classes[drawn]))


def _as_rarest(pixels: np.ndarray, rare: Sequence[int]) -> np.ndarray:
    """Return each class's pixels `(K,)`; a class of `rare` that occurs gets as few as the rarest class."""
    marked = [c for c in rare if pixels[c]]
    result = pixels.copy()
    result[marked] = pixels[pixels > 0].min(initial=pixels.max(initial=0))
    return result


class _ClassImages:
    """Images that show one class, which may be made up of several train ids."""

    def __init__(
        self,
        class_pixels: np.ndarray,
        images_with: Sequence[np.ndarray],
        train_ids: Sequence[int],
        min_pixels: int,
        limit: int,
    ) -> None:
        for least in (min_pixels, 0):
            lists = [images_with[t][: _count_above(class_pixels, images_with[t], t, least)] for t in train_ids]
            if limit < len(class_pixels):
                lists = [_mostly_below(images, limit) for images in lists]
            if any(map(len, lists)):
                break
        self._pixels, self._least, self._limit = class_pixels, least, limit
        self._members = list(zip(train_ids, lists, strict=True))
        self._ends = np.cumsum([len(images) for images in lists])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def draw(self, generator: np.random.Generator) -> int:
        """Draw an image uniformly. An image that several train ids list counts for the first of them only."""
        for _ in range(_MAX_DRAWS):
            place = int(generator.integers(self._ends[-1]))
            member = int(np.searchsorted(self._ends, place, side="right"))
            images = self._members[member][1]
            image = int(images[place - int(self._ends[member])])  # counted from the list's end
            earlier = (_pixels_of(self._pixels, image, t) for t, _ in self._members[:member])
            if _in_set(image, self._pixels) < self._limit and all(pixels <= self._least for pixels in earlier):
                return image
        raise ValueError(f"no image is found in {_MAX_DRAWS:,} draws of a class; {_DAMAGED}.")


def _mostly_below(images: np.ndarray, limit: int) -> np.ndarray:
    """Return the images below `limit`, or the mapped list itself if drawing until one is below takes few draws."""
    probes = images[:: max(1, len(images) // _NUM_PROBES)]
    if np.count_nonzero(probes < limit) > _ENOUGH_SHARE * len(probes):
        return images
    blocks = (images[start : start + _IMAGES_AT_ONCE] for start in range(0, len(images), _IMAGES_AT_ONCE))
    return np.concatenate([np.empty(0, images.dtype), *(block[block < limit] for block in blocks)])


def _count_above(class_pixels: np.ndarray, images: np.ndarray, train_id: int, least: int) -> int:
    """Count the `images`, sorted by falling pixels of `train_id`, that have more than `least` of them."""
    return bisect.bisect_left(
        range(len(images)), -least, key=lambda i: -_pixels_of(class_pixels, int(images[i]), train_id)
    )


def _pixels_of(class_pixels: np.ndarray, image: int, train_id: int) -> int:
    return int(class_pixels[_in_set(image, class_pixels), train_id])


def _in_set(image: int, class_pixels: np.ndarray) -> int:
    """Return the image's number. Raises ValueError if the set has no such image, as where an index is damaged."""
    if image >= len(class_pixels):
        raise ValueError(f"classes.npy of an index names sample {image} of {len(class_pixels)}; {_DAMAGED}.")
    return image


class SubsetOrder:
    """Order over the `positions` of a set that are in use; `order` counts only those."""

    def __init__(self, order: Order, positions: Sequence[int] | np.ndarray) -> None:
        self.order, self.positions = order, positions

    def __getitem__(self, number: int) -> Draw:
        draw = self.order[number]
        return replace(draw, index=int(self.positions[draw.index]))


class MixedOrder:
    """Mixture of several sets: of each 10,000 numbers, set i gets its weight's share, spread by a keyed permutation.

    Each set follows its own order number by number, so no sample of it is skipped or repeated.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], *, seed: int, stream: str) -> None:
        self.orders, self.seed, self.stream = list(orders), seed, stream
        ends = [round(_MIXTURE_BLOCK * sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))]
        self._starts, self.shares = [0, *ends[:-1]], np.diff([0, *ends]).tolist()
        if min(self.shares) < 1:
            raise ValueError(
                f"data.{stream}: weights {list(weights)} give a set less than one of {_MIXTURE_BLOCK:,} samples; "
                f"give it more, or leave it out."
            )

    def __getitem__(self, number: int) -> Draw:
        block, position = divmod(number, _MIXTURE_BLOCK)
        slot = Permutation(_MIXTURE_BLOCK, rng.key(self.seed, f"{self.stream}/mixture", block))[position]
        part = bisect.bisect_right(self._starts, slot) - 1
        own_number = block * self.shares[part] + slot - self._starts[part]
        return replace(self.orders[part][own_number], part=part)
