"""Bytes to arrays: simplejpeg for JPEG, PIL for PNG and WebP; the format is read from the bytes, not from a name.

What arrives may be hostile. Sizes are checked in the header, before memory is spent on pixels, and nothing but the
three formats is tried.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
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
"""What a file that cannot be read, or bytes that are broken, hostile, or no image, raise."""

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
    may be a view of a larger array. Raises ValueError.
    """
    _check(image_size(data), window)
    if simplejpeg.is_jpeg(data):
        _check_scans(data)
        with _as_value_errors("simplejpeg"):
            image = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return image if window is None else _cut(image, window)
    with open_image(data) as image:
        if image.mode not in _IMAGE_MODES:
            raise ValueError(f"its pixels are of mode {image.mode}; images must have 8 bits a channel")
        if image.mode == "P" and image.palette is None:  # PIL refuses it at times, and draws it black at others
            raise ValueError("it has the indices of a palette, and no palette")
        if window is None:
            return np.array(image.convert("RGB"))
        _stop_after(image, window.top + window.height)
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        return np.array(image.crop(box).convert("RGB"))


def decode_label(data: bytes) -> np.ndarray:
    """An encoded label image to `(H, W)` integers: grey values, or the indices of a palettised image.

    The array may be read-only. Raises ValueError.
    """
    _check(image_size(data), None)
    ids = decode_grey_png(data)
    if ids is not None:
        return ids
    with open_image(data) as image:
        if image.mode not in _LABEL_MODES:
            raise ValueError(f"it has several channels (mode {image.mode}); labels must have one id a pixel")
        return np.array(image)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, read from its header. Raises ValueError."""
    _check_bytes(data)
    if simplejpeg.is_jpeg(data):
        with _as_value_errors("simplejpeg"):
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return int(height), int(width)
    if data[:8] == SIGNATURE:
        return read_png_size(data)
    with open_image(data) as image:
        return image.height, image.width


@contextmanager
def open_image(data: bytes) -> Iterator[ImageFile.ImageFile]:
    """A PNG or WebP within the limits, opened by PIL; its pixels are not yet decoded.

    Raises ValueError for whatever PIL raises, now or inside the block; MemoryError stays one.
    """
    _check_bytes(data)
    announced = read_png_size(data) if data[:8] == SIGNATURE else None
    if announced:
        _check(announced, None)
    with _as_value_errors("PIL"), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_opened(image, announced)
        yield image


@contextmanager
def _as_value_errors(library: str) -> Iterator[None]:
    """Damaged files take the libraries anywhere, to failed assertions and missing keys too.

    Within the limits, a lack of memory is the machine's fault and not the file's.
    """
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except UnidentifiedImageError:  # its message names a buffer
        raise ValueError("it is no image of a known format (JPEG, PNG, WebP)") from None
    except Exception as error:
        raise ValueError(f"{library} cannot read it ({type(error).__name__}: {error})") from error


def _check_bytes(data: bytes) -> None:
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes; an image may have {MAX_BYTES}")


def _check(size: tuple[int, int], window: Window | None) -> None:
    """Refuses what is too large, and a window that is not inside."""
    height, width = size
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"it has {height}x{width} pixels; an image may have 1 to {MAX_PIXELS}")
    if window and (
        min(window.top, window.left) < 0 or window.top + window.height > height or window.left + window.width > width
    ):
        raise ValueError(f"it has {height}x{width} pixels, in which {window} does not lie")


def _check_opened(image: ImageFile.ImageFile, announced: tuple[int, int] | None) -> None:
    """Refuses what is not as its header announced: PIL takes the size from the last of several headers."""
    size = image.height, image.width
    if announced and size != announced:
        raise ValueError(f"it has {size[0]}x{size[1]} pixels, its first header says {announced[0]}x{announced[1]}")
    _check(size, None)
    if any(tile.extents != (0, 0, image.width, image.height) for tile in image.tile):  # of an animated PNG
        raise ValueError("its first frame does not fill it")


def _check_scans(data: bytes) -> None:
    codes = np.frombuffer(data, np.uint8)
    num_scans = np.count_nonzero((codes[:-1] == 0xFF) & (codes[1:] == 0xDA))
    if num_scans > MAX_SCANS:
        raise ValueError(f"it has {num_scans} scans; a JPEG may have {MAX_SCANS}")


def _stop_after(image: ImageFile.ImageFile, num_rows: int) -> None:
    """Has PIL decode the first rows only, where the format stores rows one after the other."""
    if image.format == "PNG" and not image.info.get("interlace"):
        image.tile = [tile._replace(extents=(0, 0, image.width, num_rows)) for tile in image.tile]


def _cut(array: np.ndarray, window: Window) -> np.ndarray:
    return array[window.top : window.top + window.height, window.left : window.left + window.width]
