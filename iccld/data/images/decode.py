"""Bytes to arrays, the one way for making, indexing, verifying, training and predicting.

    bytes ── format, size, depth, orientation, by the file's own header ── limits ── pixels ── upright ── window

simplejpeg decodes JPEG where it is installed, PIL the rest: the same pixels, as both hold libjpeg-turbo, but PIL is
slower, and passes over some of the damage that simplejpeg refuses. What arrives may be hostile: sizes are checked in
the header, before memory is spent on pixels, and nothing but the formats asked for is tried.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from iccld.data.images.grey_png import decode_grey_png
from iccld.data.images.jpeg import JpegHeader, count_scans, only_pixels, read_jpeg_header, without_padding
from iccld.data.images.orientation import UPRIGHT, is_turned, read_orientation, upright
from iccld.data.images.png import PALETTE, png_orientation, read_palette, read_png_header, read_samples

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

LABEL_EXTENSION = "label.png"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 2**26
"""The most pixels of an image: 8192 x 8192. PIL warns from 89 million on."""
MAX_BYTES = 2**28
"""The most bytes of an encoded image."""
MAX_SCANS = 100
"""The most scans of a JPEG; progressive ones have about ten."""
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error)
"""Errors of a file that cannot be read, and of bytes that are broken, hostile, or no image."""
DARK = "images of 16 bits are almost black: no value is above 1/15 of the range (scale those of 10 or 12 bits first)"
"""Words for images that `is_dark` finds, which follow their number."""
_DARK = 16  # of 255: what 12 of 16 bits become
_TIFF_DEPTH = 258
_MAX_PARTS = 2**16
_SAMPLINGS = {(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)}
"""Samplings of brightness against colours that simplejpeg has a name for."""


class Format(Enum):
    """Image formats, by their names in PIL."""

    JPEG = "JPEG"
    PNG = "PNG"
    WEBP = "WEBP"
    BMP = "BMP"
    GIF = "GIF"
    PPM = "PPM"
    TIFF = "TIFF"


PACKED = (Format.JPEG, Format.PNG, Format.WEBP)
"""The formats that shards hold, and that they are made from."""
LOOSE = tuple(Format)
"""The formats in which a user's own images are segmented; the first of several frames or pages counts."""

_MAGIC = {
    b"\xff\xd8\xff": Format.JPEG,
    b"\x89PNG\r\n\x1a\n": Format.PNG,
    b"BM": Format.BMP,
    b"GIF87a": Format.GIF,
    b"GIF89a": Format.GIF,
    **{b"P%d%c" % (number, space): Format.PPM for number in range(1, 7) for space in b" \t\r\n#"},
    b"II*\0": Format.TIFF,
    b"MM\0*": Format.TIFF,
    b"II+\0": Format.TIFF,
    b"MM\0+": Format.TIFF,
}
_STRANGERS = {
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"\xff\x4f\xff\x51": "a JPEG 2000",
    b"\xff\x0a": "a JPEG XL",
    b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"version https://git-lfs": "a pointer of Git LFS, whose file was not fetched",
    b"<": "a page of the web, or another text with tags",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip",
    b"\x1f\x8b": "a file of gzip",
}


class Window(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Header(NamedTuple):
    """Format, stored size and orientation of an image; `jpeg` is the rest of a JPEG's header."""

    format: Format
    height: int
    width: int
    orientation: int
    jpeg: JpegHeader | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) of the upright image."""
        return (self.width, self.height) if is_turned(self.orientation) else (self.height, self.width)


def decode_image(data: bytes, *, window: Window | None = None, formats: tuple[Format, ...] = PACKED) -> np.ndarray:
    """Decode an image, or a window of it, to `(H, W, 3)` uint8 RGB; either way gives the same pixels.

    The image is turned upright first, and the window is one of the upright image. Alpha is dropped, and other depths
    are scaled to 8 bits. Of a PNG, no rows below the window are decoded. Of a JPEG all are: libjpeg-turbo could skip
    some, but no package that installs everywhere offers it, and most of the time is spent on bits that must be read in
    any case. The result may be a view of a larger array. Raises ValueError.
    """
    header = _read_header(data, formats)
    _check_inside(header.size, window)
    if header.format is Format.PNG and window and header.orientation == UPRIGHT:
        top, left, height, width = window
        return _png_colors(data, box=(left, top, left + width, top + height))
    if header.jpeg:
        image = _decode_jpeg(data, header.jpeg)
    elif header.format is Format.PNG:
        image = _png_colors(data)
    else:
        image = _decode_by_pil(data, header.format)
    if image.shape[:2] != (header.height, header.width) and header.format is not Format.TIFF:
        raise ValueError(
            f"its header says {header.height}x{header.width} pixels, it has {image.shape[0]}x{image.shape[1]}"
        )
    return _cut(upright(image, header.orientation), window)


def decode_label(data: bytes) -> np.ndarray:
    """Decode a label image to `(H, W)` ids, uint8 or (16 bits) uint16: grey values, or indices of a palette.

    An image of several channels is read if they say one id: equal colours, and opaque alpha. The array may be
    read-only. Raises ValueError.
    """
    header = _read_header(data, PACKED)
    ids = decode_grey_png(data) if header.format is Format.PNG else None
    return upright(ids, header.orientation) if ids is not None else _one_channel(decode_channels(data))


def decode_channels(data: bytes) -> np.ndarray:
    """Decode a label image to its stored samples `(H, W, C)`, uint8 or uint16; alpha is the last of 2 or 4 channels.

    Raises ValueError.
    """
    header = _read_header(data, PACKED)
    refuse_lossy(data)
    channels = _png_samples(data) if header.format is Format.PNG else _decode_by_pil(data, header.format)
    return upright(channels, header.orientation)


def refuse_lossy(data: bytes) -> None:
    """Refuse a label image in a format that does not keep the values that were written."""
    found = find_format(data)
    lossy = found is Format.WEBP and all(kind != b"VP8L" for kind, _, _ in _webp_parts(data))
    if found is Format.JPEG or lossy:
        kind = "a JPEG" if found is Format.JPEG else "a lossy WebP"
        raise ValueError(f"it is {kind}, which keeps colours roughly and ids not at all; export labels as PNG")


def image_size(data: bytes) -> tuple[int, int]:
    """Return (height, width) of an upright encoded image, read from its header. Raises ValueError."""
    return _read_header(data, PACKED).size


def is_upright(data: bytes) -> bool:
    """Tell whether an encoded image is stored upright. Raises ValueError."""
    return _read_header(data, PACKED).orientation == UPRIGHT


def turned_apart(image: bytes, label: bytes) -> bool:
    """Tell whether an image and its label, of one upright size, are turned in ways that this size cannot tell apart.

    A label that is no image is not turned. Raises ValueError.
    """
    header, label_turn = _read_header(image, PACKED), UPRIGHT
    if find_format(label):
        label_turn = _read_header(label, PACKED).orientation
    told_by_size = header.height != header.width and is_turned(header.orientation) != is_turned(label_turn)
    return header.orientation != label_turn and not told_by_size


def is_dark(data: bytes, image: np.ndarray) -> bool:
    """Tell whether an image has 16 bits a sample and is almost black, as if it held 10 or 12 bits, not scaled to 16."""
    depth, found = 8, find_format(data)
    if found is Format.PNG:
        depth = read_png_header(data).depth
    elif found is Format.TIFF:
        with as_value_errors("PIL"), Image.open(io.BytesIO(data), formats=(found.value,)) as opened:
            depth = opened.tag_v2.get(_TIFF_DEPTH, (1,))[0] if isinstance(opened, TiffImageFile) else depth
    return depth == 16 and image.max(initial=0) <= _DARK


def find_format(data: bytes) -> Format | None:
    """Return the format that the first 16 bytes name."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return Format.WEBP
    return next((format_ for magic, format_ in _MAGIC.items() if data.startswith(magic)), None)


def _read_header(data: bytes, formats: tuple[Format, ...]) -> _Header:
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes; an image may have {MAX_BYTES}")
    found = find_format(data)
    if found not in formats:
        raise ValueError(_not_one_of(formats, data, found))
    if found is Format.JPEG:
        jpeg = read_jpeg_header(data)
        header = _Header(found, jpeg.height, jpeg.width, jpeg.orientation, jpeg)
    elif found is Format.PNG:
        header = _Header(found, *read_png_header(data)[:2], png_orientation(data))
    else:
        orientation = _webp_orientation(data) if found is Format.WEBP else UPRIGHT  # PIL turns TIFFs itself
        with as_value_errors("PIL"), Image.open(io.BytesIO(data), formats=(found.value,)) as image:
            header = _Header(found, image.height, image.width, orientation)
    _check_size(header.height, header.width)
    return header


def _check_size(height: int, width: int) -> None:
    """Refuse an image that is empty or too large."""
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"it has {height}x{width} pixels; an image may have 1 to {MAX_PIXELS}")


@contextmanager
def as_value_errors(library: str) -> Iterator[None]:
    """Turn everything that a library raises on a damaged file into ValueError, failed assertions too.

    MemoryError stays: within the limits, a lack of memory is the machine's fault and not the file's.
    """
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except UnidentifiedImageError:  # its message names a buffer
        raise ValueError("its header is damaged") from None
    except Exception as error:
        raise ValueError(f"{library} cannot read it ({type(error).__name__}: {error})") from error


def _not_one_of(formats: tuple[Format, ...], data: bytes, found: Format | None) -> str:
    """Explain why the data is not read."""
    known = ", ".join(format_.value.replace("WEBP", "WebP") for format_ in formats)
    stranger = next((name for magic, name in _STRANGERS.items() if data[:64].lstrip().startswith(magic)), "")
    if data[4:8] == b"ftyp":
        stranger = "a HEIF or AVIF image, or a film"
    what = f"a {found.value}" if found else stranger
    if not data:
        return "it is empty"
    return f"it is {what}; {known} can be read" if what else f"it is no image of a known format ({known})"


def _check_inside(size: tuple[int, int], window: Window | None) -> None:
    height, width = size
    if window and (
        min(window.top, window.left) < 0 or window.top + window.height > height or window.left + window.width > width
    ):
        raise ValueError(f"it has {height}x{width} pixels, in which {window} does not lie")


def _decode_jpeg(data: bytes, header: JpegHeader) -> np.ndarray:
    """Decode to `(H, W, 3)` uint8 as stored. PIL decodes CMYK, and samplings that have no name."""
    if header.depth != 8 or not header.usual:
        kind = "without the usual compression" if header.depth == 8 else f"of {header.depth} bits a sample"
        raise ValueError(f"it is a JPEG {kind}; export it as a usual one, or as PNG")
    num_scans = count_scans(data, header, at_most=MAX_SCANS)
    if num_scans > MAX_SCANS:
        raise ValueError(f"it has {num_scans} scans; a JPEG may have {MAX_SCANS}")
    brightness, *colors = header.samplings
    strange = len(colors) not in (0, 2) or (colors and (brightness not in _SAMPLINGS or set(colors) != {(1, 1)}))
    if strange or simplejpeg is None:
        return _decode_by_pil(only_pixels(data, header), Format.JPEG)
    try:
        return _decode_by_simplejpeg(data, header)
    except ValueError as error:  # simplejpeg raises it at the least irregularity
        if "extraneous bytes" not in str(error):
            raise
    data = only_pixels(data, header)
    try:
        return _decode_by_simplejpeg(data, header)
    except ValueError as error:
        return _decode_by_simplejpeg(without_padding(data, str(error)), header)


def _decode_by_simplejpeg(data: bytes, header: JpegHeader) -> np.ndarray:
    assert simplejpeg is not None, "PIL decodes where it is missing"
    with as_value_errors("simplejpeg"):
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != (header.height, header.width):
            raise ValueError("it is a JPEG with several headers")
        return simplejpeg.decode_jpeg(data, colorspace="RGB")


def _decode_by_pil(data: bytes, format_: Format) -> np.ndarray:
    """Decode the first frame or page with PIL to `(H, W, 3)` uint8. PIL turns TIFFs upright itself."""
    with as_value_errors("PIL"), Image.open(io.BytesIO(data), formats=(format_.value,)) as image:
        _check_size(image.height, image.width)
        if image.mode == "F" or (image.mode == "I" and format_ is Format.TIFF):
            raise ValueError("pixels of 32 bits have no known range; save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits, which PIL would clip to 255
            depth = image.tag_v2.get(_TIFF_DEPTH, (16,))[0] if isinstance(image, TiffImageFile) else 16
            samples = np.asarray(image, np.int64)[..., None]
            return _to_colors(np.clip(samples * 65535 // (2**depth - 1), 0, 65535).astype(np.uint16))
        return np.array(image.convert("RGB"))


def _png_colors(data: bytes, *, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    header, samples = read_png_header(data), _png_samples(data, box=box)
    if header.color == PALETTE:
        return read_palette(data)[samples[..., 0]]
    if header.depth < 8:
        samples = samples * np.uint8(255 // (2**header.depth - 1))
    return _to_colors(samples)


def _png_samples(data: bytes, *, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    with as_value_errors("PIL"):
        return read_samples(data, box=box)


def _to_colors(samples: np.ndarray) -> np.ndarray:
    """Turn grey or colours `(H, W, 1-4)`, uint8 or uint16, into `(H, W, 3)` uint8; alpha is dropped."""
    num_colors = 1 if samples.shape[-1] < 3 else 3
    colors = samples[..., :num_colors]
    if colors.dtype == np.uint16:
        colors = ((colors.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 to 255, rounded
    return colors if num_colors == 3 else np.repeat(colors, 3, axis=-1)


def _one_channel(channels: np.ndarray) -> np.ndarray:
    """Return the ids `(H, W)` that the channels `(H, W, C)` agree on; the last of 2 and 4 channels is alpha."""
    if channels.shape[-1] in (2, 4):
        if (channels[..., -1] != np.iinfo(channels.dtype).max).any():
            raise ValueError("it has transparent pixels; labels must have one id a pixel: export it without alpha")
        channels = channels[..., :-1]
    if (channels[..., 1:] != channels[..., :1]).any():
        raise ValueError("it has several channels, which differ; labels must have one id a pixel")
    return np.ascontiguousarray(channels[..., 0])


def _webp_parts(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each part of a WebP, and its content's range; bytes after the image's end are no part."""
    at, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    for _ in range(_MAX_PARTS):
        if at + 8 > end:
            return
        kind, length = struct.unpack_from("<4sI", data, at)
        yield kind, at + 8, at + 8 + length
        at += 8 + length + length % 2
    raise ValueError(f"it has more than {_MAX_PARTS} parts")


def _webp_orientation(data: bytes) -> int:
    found = (read_orientation(data[start:end]) for kind, start, end in _webp_parts(data) if kind == b"EXIF")
    return next(found, UPRIGHT)


def _cut(array: np.ndarray, window: Window | None) -> np.ndarray:
    if window is None:
        return array
    return array[window.top : window.top + window.height, window.left : window.left + window.width]
