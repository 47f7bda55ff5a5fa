"""Which sample comes n-th: pure functions of (seed, stream, n), in constant time and without shuffled lists."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from iccld import rng

_MASK = (1 << 64) - 1
_NUM_ROUND_PAIRS = 4


@dataclass(frozen=True)
class Draw:
    """The sample at `index` of the set; `wanted_class` is the class it was drawn for, where it was drawn for one."""

    index: int
    wanted_class: int | None


class Order(Protocol):
    """Maps a sample number (0, 1, 2, ... over the whole run) to a sample of the set."""

    def __getitem__(self, number: int) -> Draw: ...


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


class Permutation:
    """A keyed bijection of `range(size)`: a Feistel network over the cells of a grid, in O(1) memory.

    Rows and columns are shifted in turn, each by a keyed hash of the other. The grid has fewer than `2 * sqrt(size)`
    cells too many; a value that lands on one walks on along its cycle until it is inside (cycle walking).
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
        value = self._forward(self._inside(position))
        while value >= self.size:
            value = self._forward(value)
        return value

    def inverse(self, value: int) -> int:
        """The position at which `value` stands."""
        position = self._backward(self._inside(value))
        while position >= self.size:
            position = self._backward(position)
        return position

    def _inside(self, value: int) -> int:
        if not 0 <= value < self.size:
            raise IndexError(f"{value} is outside of range({self.size})")
        return value

    def _forward(self, cell: int) -> int:
        row, column = divmod(cell, self._num_columns)
        for row_key, column_key in self._rounds:
            row = (row + _mix(column ^ row_key)) % self._num_rows
            column = (column + _mix(row ^ column_key)) % self._num_columns
        return row * self._num_columns + column

    def _backward(self, cell: int) -> int:
        row, column = divmod(cell, self._num_columns)
        for row_key, column_key in reversed(self._rounds):
            column = (column - _mix(row ^ column_key)) % self._num_columns
            row = (row - _mix(column ^ row_key)) % self._num_rows
        return row * self._num_columns + column


class EpochOrder:
    """Every sample once an epoch, each epoch in its own keyed order."""

    def __init__(self, size: int, *, seed: int, stream: str) -> None:
        self.size, self.seed, self.stream = size, seed, stream

    def __getitem__(self, number: int) -> Draw:
        epoch, position = divmod(number, self.size)
        permutation = Permutation(self.size, rng.key(self.seed, f"{self.stream}/epoch", epoch))
        return Draw(permutation[position], None)


def rare_class_probabilities(class_pixels: np.ndarray, *, temperature: float) -> np.ndarray:
    """P(c) ∝ exp((1 - f_c) / T) over the classes that occur (DAFormer, eq. 12); `f_c` is the share of the pixels.

    `class_pixels` is `(K,)`, counts or shares in any unit; the result is `(K,)` float64, 0 for an absent class.
    """
    pixels = np.asarray(class_pixels, np.float64)
    scores = -pixels / max(pixels.sum(), 1.0e-300) / temperature
    weights = np.where(pixels > 0, np.exp(scores - scores[pixels > 0].max(initial=-np.inf)), 0.0)
    return weights / max(weights.sum(), 1.0e-300)


class RareClassOrder:
    """Draws a class, rare ones more often, and then an image that shows it, uniformly.

    An image shows class c with more than `min_pixels` of its pixels; where no image of the set has as many, with any.
    Held in memory: the list of images of each class, at most `8 * K` bytes an image.
    """

    def __init__(
        self, class_pixels: np.ndarray, *, seed: int, stream: str, temperature: float = 0.01, min_pixels: int = 3000
    ) -> None:
        """`class_pixels` is `(N, K)`: the pixels of each class in each image."""
        self.seed, self.stream = seed, stream
        self.probabilities = rare_class_probabilities(class_pixels.sum(0, dtype=np.float64), temperature=temperature)
        self._classes = np.flatnonzero(self.probabilities)
        if not len(self._classes):
            raise ValueError(
                f"data.rare_class_sampling: no image of the {stream} set has a labelled pixel of any class; "
                f"check the labels and data.class_set, or set data.rare_class_sampling=false."
            )
        self._cumulative = np.cumsum(self.probabilities[self._classes])
        self._images = [_images_with(class_pixels[:, c], min_pixels) for c in self._classes]

    def __getitem__(self, number: int) -> Draw:
        generator = rng.numpy_generator(self.seed, f"{self.stream}/rare_class", number)
        drawn = int(np.searchsorted(self._cumulative, generator.random(), side="right"))
        drawn = min(drawn, len(self._classes) - 1)  # the last sum may round to just below 1
        images = self._images[drawn]
        return Draw(int(images[generator.integers(len(images))]), int(self._classes[drawn]))


def _images_with(pixels: np.ndarray, min_pixels: int) -> np.ndarray:
    images = np.flatnonzero(pixels > min_pixels)
    return images if len(images) else np.flatnonzero(pixels)
