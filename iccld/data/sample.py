"""Rules for a sample, shared by making, indexing, verifying, training and scoring."""

from collections.abc import Iterator

import numpy as np

from iccld.data.images.decode import decode_image, decode_label, image_size, turned_apart
from iccld.data.storage.index import NUM_TRAIN_IDS
from iccld.labels import IGNORE_INDEX

_MAX_NAMED = 5


def examine(image_data: bytes, label_data: bytes, *, num_classes: int) -> tuple[int, int, np.ndarray]:
    """Decode an encoded image and its label (empty: none); return height, width and `(K,)` uint32 class pixels.

    Raises ValueError that says what is wrong, and with which of the two.
    """
    height, width, _ = decode_pixels(image_data).shape
    if not label_data:
        return height, width, np.zeros(num_classes, np.uint32)
    ids = decode_train_ids(label_data, (height, width), num_classes=num_classes)
    return height, width, count_classes(ids, num_classes=num_classes)


def doubts(image_data: bytes, label_data: bytes, class_pixels: np.ndarray) -> Iterator[str]:
    """Yield what may be wrong with a sound image and its label, in words that follow their number."""
    if turned_apart(image_data, label_data):
        yield "photos are turned upright by EXIF but not their labels, or the reverse (check that the two fit)"
    if not class_pixels.any():
        yield "samples show no class: all pixels of their labels are ignored"


def decode_pixels(data: bytes) -> np.ndarray:
    """Decode a sample's encoded image to `(H, W, 3)` uint8 RGB. Raises ValueError."""
    try:
        return decode_image(data)
    except ValueError as error:
        raise ValueError(f"the image cannot be decoded ({error})") from error


def decode_train_ids(data: bytes, size: tuple[int, int], *, num_classes: int) -> np.ndarray:
    """Decode a sample's encoded label to `(H, W)` uint8 ids: 0 to K-1, or 255.

    The ids count, not the bits that they are stored in. The array may be read-only. Raises ValueError if it is not of
    the image's size.
    """
    try:
        ids = decode_label(data)
    except ValueError as error:
        raise ValueError(f"the label cannot be decoded ({error})") from error
    check_train_ids(ids, num_classes=num_classes)
    check_same_size(ids, size)
    return ids.astype(np.uint8, copy=False)


def check_train_ids(ids: np.ndarray, *, num_classes: int) -> None:
    """Refuse `(H, W)` ids, of any integer type, if one is neither a class of the set nor 255."""
    if ids.dtype == np.uint8 and (ids + np.uint8(1)).max(initial=0) <= num_classes:  # 255 becomes 0
        return
    strange = [int(i) for i in np.unique(ids) if not 0 <= i < num_classes and i != IGNORE_INDEX]
    if strange:
        named = ", ".join(map(str, strange[:_MAX_NAMED])) + (", ..." if len(strange) > _MAX_NAMED else "")
        kind = "train ids" if num_classes == NUM_TRAIN_IDS else "class indices"
        rule = f"labels must hold {kind}, 0-{num_classes - 1} or {IGNORE_INDEX}"
        raise ValueError(f"the label holds {named}; {rule}")


def check_same_size(label: np.ndarray, size: tuple[int, ...]) -> None:
    """Refuse a label `(H, W)` if its image, upright, has another (height, width)."""
    if label.shape != size:
        raise ValueError(f"the label has {label.shape[0]}x{label.shape[1]} pixels, its image {size[0]}x{size[1]}")


def check_indexed_size(data: bytes, size: tuple[int, int]) -> None:
    """Refuse an encoded image if its header says another (height, width) than the index."""
    height, width = image_size(data)
    if (height, width) != size:
        raise ValueError(
            f"it has {height}x{width} pixels, its index says {size[0]}x{size[1]}; index the set again, or pack it again"
        )


def count_classes(train_ids: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Count the pixels of each class in `(H, W)` uint8 ids: `(K,)` uint32."""
    return np.bincount(train_ids.ravel(), minlength=IGNORE_INDEX + 1)[:num_classes].astype(np.uint32)
