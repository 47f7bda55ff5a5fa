"""Bytes to arrays: simplejpeg for JPEG, PIL for PNG and WebP; the format is read from the bytes, not from a name.

What arrives may be hostile. Sizes are checked in the header, before memory is spent on pixels, and nothing but the
three formats is tried.
"""

import io
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from iccld.data.grey_png import SIGNATURE, decode_grey_png, read_png_size

LABEL_EXTENSION = "label.png"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 2**26
"""Of one image: 8192 x 8192. PIL warns of more than 89 million."""
MAX_BYTES = 2**28
"""Of one encoded image."""
MAX_SCANS = 100
"""Of one JPEG: each costs time for all pixels, and next to no bytes. Progressive ones have about ten."""
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error)
"""What PIL and simplejpeg raise on bytes that are broken, hostile, or no image."""

_FORMATS = ("PNG", "WEBP")
_LABEL_MODES = ("L", "P", "I;16", "I")
_IMAGE_MODES = ("RGB", "RGBA", "L", "P")


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def decode_image(data: bytes, *, window: Window | None = None) -> np.ndarray:
    """An encoded image, or the window of it, to `(H, W, 3)` uint8 RGB: the same pixels either way.

    Of a PNG, no rows below the window are decoded. Of a JPEG all are: libjpeg-turbo could skip some, but no package
    that installs everywhere offers it, and most of the time is spent on bits that must be read in any case. The result
    may be a view of a larger array. Raises one of DECODE_ERRORS.
    """
    _check(image_size(data), window)
    if simplejpeg.is_jpeg(data):
        _check_scans(data)
        image = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return image if window is None else _cut(image, window)
    with _open(data) as image:
        if image.mode not in _IMAGE_MODES:
            raise ValueError(f"its pixels are of mode {image.mode}; images must have 8 bits a channel")
        if window is None:
            return np.array(image.convert("RGB"))
        _stop_after(image, window.top + window.height)
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        return np.array(image.crop(box).convert("RGB"))


def decode_label(data: bytes) -> np.ndarray:
    """An encoded label image to `(H, W)` integers: grey values, or the indices of a palettised image.

    The array may be read-only. Raises one of DECODE_ERRORS.
    """
    _check(image_size(data), None)
    ids = decode_grey_png(data)
    if ids is not None:
        return ids
    with _open(data) as image:
        if image.mode not in _LABEL_MODES:
            raise ValueError(f"it has several channels (mode {image.mode}); labels must have one id a pixel")
        return np.array(image)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, read from its header."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes; an image may have {MAX_BYTES}")
    if simplejpeg.is_jpeg(data):
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return int(height), int(width)
    if data[:8] == SIGNATURE:
        return read_png_size(data)
    with _open(data) as image:
        return image.height, image.width


def _check(size: tuple[int, int], window: Window | None) -> None:
    """Refuses what is too large, and a window that is not inside."""
    height, width = size
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"it has {height}x{width} pixels; an image may have 1 to {MAX_PIXELS}")
    if window and (
        min(window.top, window.left) < 0 or window.top + window.height > height or window.left + window.width > width
    ):
        raise ValueError(f"it has {height}x{width} pixels, in which {window} does not lie")


def _check_scans(data: bytes) -> None:
    codes = np.frombuffer(data, np.uint8)
    num_scans = np.count_nonzero((codes[:-1] == 0xFF) & (codes[1:] == 0xDA))
    if num_scans > MAX_SCANS:
        raise ValueError(f"it has {num_scans} scans; a JPEG may have {MAX_SCANS}")


def _open(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:  # its message names a buffer
        raise ValueError("it is no image of a known format (JPEG, PNG, WebP)") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"it is too large: {error}") from error


def _stop_after(image: ImageFile.ImageFile, num_rows: int) -> None:
    """Has PIL decode the first rows only, where the format stores rows one after the other."""
    if image.format == "PNG" and not image.info.get("interlace"):
        image.tile = [tile._replace(extents=(0, 0, image.width, num_rows)) for tile in image.tile]


def _cut(array: np.ndarray, window: Window) -> np.ndarray:
    return array[window.top : window.top + window.height, window.left : window.left + window.width]
