"""PNGs of every kind that the format allows, decoded to the samples that were written.

    colour type         depths            samples
    0 grey              1, 2, 4, 8, 16    (H, W, 1)
    2 RGB               8, 16             (H, W, 3)
    3 palette           1, 2, 4, 8        (H, W, 1), indices
    4 grey and alpha    8, 16             (H, W, 2)
    6 RGB and alpha     8, 16             (H, W, 4)

PIL undoes compression, filters and interlacing. It is given only what pixels depend on: of the other chunks, some make
it fail, and some change the picture. Where it scales or drops bits, it is told another header.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from iccld.data.images.orientation import UPRIGHT, read_orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
_DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), RGB_ALPHA: (8, 16)}
_MAX_CHUNKS = 2**18
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")

Box = tuple[int, int, int, int]


class PngHeader(NamedTuple):
    """Content of the first chunk, IHDR."""

    height: int
    width: int
    depth: int
    color: int
    interlaced: bool


class Chunk(NamedTuple):
    """Kind of a chunk, and the range of its content."""

    kind: bytes
    start: int
    end: int


def read_png_header(data: bytes) -> PngHeader:
    """Read the header. Raises ValueError if it is cut short, not the first chunk, or of an unknown kind."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ValueError("it does not begin with a PNG's header")
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if depth not in _DEPTHS.get(color, ()):
        raise ValueError(
            f"it is a PNG of colour type {color} with {depth} bits a sample, which the format does not know"
        )
    return PngHeader(height, width, depth, color, bool(interlaced))


def png_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks in order, up to the end mark; the last may be cut off. Raises ValueError for absurdly many."""
    start, kind = 8, b""
    for _ in range(_MAX_CHUNKS):
        if start + 8 > len(data) or kind == b"IEND":
            return
        length, kind = struct.unpack_from(">I4s", data, start)
        yield Chunk(kind, start + 8, start + 8 + length)
        start += 12 + length
    raise ValueError(f"it has more than {_MAX_CHUNKS} chunks")


def png_orientation(data: bytes) -> int:
    """Return the orientation of the EXIF chunk, which may come before or after the pixels."""
    found = (read_orientation(data[start:end]) for kind, start, end in png_chunks(data) if kind == b"eXIf")
    return next(found, UPRIGHT)


def read_palette(data: bytes) -> np.ndarray:
    """Return the colour of each index, `(256, 3)` uint8, black beyond the palette. Raises ValueError without one."""
    colors = next((data[start:end] for kind, start, end in png_chunks(data) if kind == b"PLTE"), b"")[:768]
    if len(colors) < 3:
        raise ValueError("it has the indices of a palette, and no palette")
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors) // 3] = np.frombuffer(colors, np.uint8, len(colors) // 3 * 3).reshape(-1, 3)
    return table


def read_samples(data: bytes, *, box: Box | None = None) -> np.ndarray:
    """Decode the samples as they were written, `(H, W, C)`: uint16 for 16 bits, uint8 for fewer.

    `box` (left, top, right, bottom) selects a part; no rows below it are decoded. The caller has checked the size.
    Raises ValueError, and whatever PIL raises on damaged bytes.
    """
    header, pixels = read_png_header(data), _only_pixels(data)
    if header.depth == 16 and header.color == GREY_ALPHA:  # which PIL would cut to the high bytes
        high_low = _decode(_relabelled(pixels, depth=8, color=RGB_ALPHA), box)
        return high_low[..., ::2].astype(np.uint16) << 8 | high_low[..., 1::2]
    if header.depth == 16 and header.color != GREY:  # told that it is little-endian, PIL keeps the other byte
        high, low = (_decode(pixels, box, byte_order=order) for order in "BL")
        return high.astype(np.uint16) << 8 | low
    samples = _decode(pixels, box)
    if header.color == GREY and header.depth in (2, 4):  # PIL spreads them over 0 to 255
        samples //= np.uint8(255 // (2**header.depth - 1))
    return samples


def _decode(data: bytes, box: Box | None, *, byte_order: str = "") -> np.ndarray:
    """Decode the pixels with PIL: `(H, W, C)`."""
    header = read_png_header(data)
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        assert (image.height, image.width) == header[:2], "there is one header"
        if byte_order:
            image.tile = [tile._replace(args=f"{image.mode};16{byte_order}") for tile in image.tile]
        if box and not image.info.get("interlace"):
            image.tile = [tile._replace(extents=(0, 0, image.width, box[3])) for tile in image.tile]
        pixels = np.array(image.crop(box) if box else image)
    if pixels.dtype == bool:  # whose bytes are 255 in PIL
        pixels = (pixels.view(np.uint8) != 0).astype(np.uint8)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _only_pixels(data: bytes) -> bytes:
    """Return the PNG without the chunks that pixels do not depend on."""
    chunks = list(png_chunks(data))
    if sum(chunk.kind == b"IHDR" for chunk in chunks) > 1:
        raise ValueError("it has several headers")
    if all(chunk.kind in _PIXELS for chunk in chunks):
        return data
    return SIGNATURE + b"".join(data[start - 8 : end + 4] for kind, start, end in chunks if kind in _PIXELS)


def _relabelled(data: bytes, *, depth: int, color: int) -> bytes:
    """Return the same bytes under a header of another kind whose pixels are as wide."""
    header = data[12:24] + bytes((depth, color)) + data[26:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
