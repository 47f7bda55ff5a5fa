"""Encoding of a pair to the bytes that are stored; a bad pair is refused with the reason."""

import io
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from iccld.data.images.decode import (
    DARK,
    DECODE_ERRORS,
    MAX_PIXELS,
    Format,
    decode_image,
    find_format,
    is_dark,
    is_upright,
)
from iccld.data.images.grey_png import encode_grey_png
from iccld.data.sample import check_same_size, check_train_ids, count_classes, doubts
from iccld.data.shards.converters import Converter, Pair, UnknownIds
from iccld.data.shards.tally import Tally
from iccld.data.shards.tars import LEAVE_OUT, Problem, Unusable

_FETCH = f"fetch or export it again, {LEAVE_OUT}"
_LOSSY = (
    "images were encoded anew as JPEGs of quality {}, with some loss (--image-format png or webp loses nothing, and "
    "keep copies what is not resized)"
)


class ImageFormat(Enum):
    """Storage of images: PNG and WebP without loss; `keep` copies a file's bytes if it needs no change."""

    JPG = "jpg"
    PNG = "png"
    WEBP = "webp"
    KEEP = "keep"


MAX_SIDES = {ImageFormat.JPG: 65_500, ImageFormat.WEBP: 16_383}
"""The longest sides, in pixels, that libjpeg and WebP write."""
_EXTENSIONS = {Format.JPEG: "jpg", Format.PNG: "png", Format.WEBP: "webp"}


@dataclass(frozen=True)
class Packing:
    """Settings of how pairs are stored. `quality` is JPEG's; `exact_size`: (height, width); `max_bytes` 0: no limit."""

    image_format: ImageFormat
    quality: int = 95
    with_labels: bool = True
    max_side: int = 0
    exact_size: tuple[int, int] | None = None
    max_bytes: int = 0

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the stored (height, width) of an image; `max_side` never enlarges."""
        if self.exact_size:
            return self.exact_size
        if not self.max_side or max(height, width) <= self.max_side:
            return height, width
        scale = self.max_side / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


class PackedPair(NamedTuple):
    """Pair as it is stored; `label` is empty without labels. `facts` are height, width and class pixels.

    `noted` counts what the user may not expect, though the pair is sound.
    """

    extension: str
    image: bytes
    label: bytes
    facts: tuple[int, int, np.ndarray]
    noted: Tally


def pack_pair(pair: Pair, converter: Converter, packing: Packing) -> PackedPair:
    """Read, check, resize and encode a pair, or raise Unusable."""
    try:
        return _pack(pair, converter, packing)
    except MemoryError as error:
        file, remedy = converter.tree.location(pair.image), f"use fewer --workers, {LEAVE_OUT}"
        raise Unusable(Problem(file, "memory does not suffice for it", remedy)) from error


def _pack(pair: Pair, converter: Converter, packing: Packing) -> PackedPair:
    file = converter.tree.location(pair.image)
    try:
        data = converter.tree.read(pair.image)
        image = decode_image(data)
    except DECODE_ERRORS as error:
        raise Unusable(Problem(file, f"the image cannot be read ({error})", _FETCH)) from error
    noted, (height, width) = Tally(), packing.size_of(*image.shape[:2])
    class_pixels, label = np.zeros(converter.num_classes, np.uint32), b""
    if packing.with_labels:
        label_data, train_ids = _read_labels(pair, converter, image.shape[:2])
        resized = np.asarray(Image.fromarray(train_ids).resize((width, height), Image.Resampling.NEAREST))
        class_pixels, label = count_classes(resized, num_classes=converter.num_classes), encode_grey_png(resized)
        for doubt in doubts(data, label_data, class_pixels):
            noted.add(doubt, file)
        if count := converter.count_not_drawn(label_data):
            noted.add("outlines have fewer than 3 points and are not drawn", file, count)
    try:
        extension, stored = _store(data, image, (height, width), packing)
    except ValueError as error:
        raise Unusable(Problem(file, str(error), f"use --max-side or --image-format png, {LEAVE_OUT}")) from error
    if is_dark(data, image):
        noted.add(DARK, file)
    if extension == "jpg" and stored != data:
        noted.add(_LOSSY.format(packing.quality), file)
    return PackedPair(extension, stored, label, (height, width, class_pixels), noted)


def _store(data: bytes, image: np.ndarray, size: tuple[int, int], packing: Packing) -> tuple[str, bytes]:
    """Return extension and bytes of an image `(H, W, 3)` uint8 in the stored size and format. Raises ValueError."""
    extension = packing.image_format.value
    if packing.image_format is ImageFormat.KEEP:
        format_ = find_format(data)
        assert format_ in _EXTENSIONS, "it was decoded"
        extension = _EXTENSIONS[format_]
        if size == image.shape[:2] and is_upright(data):  # not every reader of shards looks at the EXIF tag
            return extension, data
    limit = MAX_SIDES.get(ImageFormat(extension), MAX_PIXELS)
    if max(size) > limit:
        raise ValueError(f"it would have {size[0]}x{size[1]} pixels, of which a side may have {limit} in {extension}")
    # PIL's BILINEAR is antialiased where it shrinks.
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    if extension == "jpg":
        return "jpg", _encoded(resized, "jpeg", quality=packing.quality, subsampling="4:2:0")
    if extension == "webp":
        return "webp", _encoded(resized, "webp", lossless=True)
    return "png", _encoded(resized, "png")


def _read_labels(pair: Pair, converter: Converter, image_size: tuple[int, ...]) -> tuple[bytes, np.ndarray]:
    """Return the label file's bytes and its train ids."""
    if pair.label is None or not converter.tree.exists(pair.label):
        expected = converter.tree.location(pair.label) if pair.label else "its data set has none"
        what, remedy = f"it has no label ({expected})", f"add it, use --no-labels for a target set, {LEAVE_OUT}"
        raise Unusable(Problem(converter.tree.location(pair.image), what, remedy))
    file = converter.tree.location(pair.label)
    try:
        data = converter.tree.read(pair.label)
        labels = converter.train_ids(pair.label, data)
    except UnknownIds as error:
        raise Unusable(Problem(file, str(error), f"correct it, or complete the mapping, {LEAVE_OUT}")) from error
    except DECODE_ERRORS as error:
        raise Unusable(Problem(file, f"the label cannot be read ({error})", _FETCH)) from error
    try:
        check_train_ids(labels, num_classes=converter.num_classes)
        check_same_size(labels, image_size)
    except ValueError as error:
        remedy = f"export the two in one size, both upright, with train ids, {LEAVE_OUT}"
        raise Unusable(Problem(file, str(error), remedy)) from error
    return data, labels


def _encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()
