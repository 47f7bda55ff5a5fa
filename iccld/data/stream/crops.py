"""Crops and flips, drawn for each sample number. Photometric augmentation runs on the device, in `iccld.uda`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from iccld.labels import IGNORE_INDEX

CROP_TRIES = 10


class Crop(NamedTuple):
    """The window's first row and column in the image, and a flag that mirrors it left to right after cutting."""

    top: int
    left: int
    flip: bool


def draw_crop(
    image_size: tuple[int, int],
    crop_size: tuple[int, int],
    *,
    flip: float,
    generator: np.random.Generator,
    merit: Callable[[Crop], int] | None = None,
    full_merit: int = 3,
) -> Crop:
    """Draw a crop uniformly. Sizes are (height, width); `flip` is the probability of mirroring.

    With `merit`, up to 10 crops are drawn until one reaches `full_merit`; if none does, the first of the best is taken.
    """
    flipped = bool(generator.random() < flip)
    best, best_merit = None, -1
    for _ in range(CROP_TRIES):
        top, left = (int(generator.integers(image_size[i] - crop_size[i] + 1)) for i in (0, 1))
        crop = Crop(top, left, flipped)
        value = full_merit if merit is None else merit(crop)
        if value > best_merit:
            best, best_merit = crop, value
        if best_merit >= full_merit:
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


def apply_crop(array: np.ndarray, crop: Crop, crop_size: tuple[int, int]) -> np.ndarray:
    """Return a view of the window of an `(H, W, ...)` array: `(h, w, ...)`."""
    window = array[crop.top : crop.top + crop_size[0], crop.left : crop.left + crop_size[1]]
    return window[:, ::-1] if crop.flip else window


def valid_rows(
    image_height: int, crop: Crop, crop_height: int, *, margin_top: float, margin_bottom: float
) -> np.ndarray:
    """Mark the rows of the window outside the image's margins: `(h,)` bool. Margins are fractions of its height."""
    rows = np.arange(crop.top, crop.top + crop_height)
    return (rows >= round(margin_top * image_height)) & (rows < image_height - round(margin_bottom * image_height))
