"""PNGs of one byte a pixel whose rows are stored as they are: the fastest labels to read, and any reader reads them.

Encoders usually predict pixels from their neighbours (PNG's filters). That is for photographs: it makes maps of ids no
smaller, and undoing it takes most of the time of reading them.
"""

import struct
import zlib

import numpy as np

from iccld.data import deflate
from iccld.data.images.png import GREY, PALETTE, SIGNATURE, png_chunks

_COMPRESSION_LEVEL = 6


def encode_grey_png(ids: np.ndarray) -> bytes:
    """`(H, W)` uint8 to an 8-bit greyscale PNG without filters."""
    height, width = ids.shape
    rows = np.zeros((height, 1 + width), np.uint8)  # each row begins with the number of its filter: 0, none
    rows[:, 1:] = ids
    header = struct.pack(">IIBBBBB", width, height, 8, GREY, 0, 0, 0)
    pixels = deflate.compress(rows, _COMPRESSION_LEVEL)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decode_grey_png(data: bytes) -> np.ndarray | None:
    """The `(H, W)` uint8 values or palette indices of a PNG that `encode_grey_png` could have stored.

    None for any other, and for a broken one: another reader will say what is wrong with it. The array is read-only.
    """
    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, depth, color, *rest = struct.unpack_from(">IIBBBBB", data, 16)
    if depth != 8 or color not in (GREY, PALETTE) or any(rest) or not height * width:
        return None
    size = height * (1 + width)
    inflater = deflate.decompressobj()
    try:
        pixels = inflater.decompress(_image_data(data), size + 1)  # never more, whatever the data would grow to
    except deflate.InflateError:
        return None
    if len(pixels) != size or not inflater.eof:
        return None
    rows = np.frombuffer(pixels, np.uint8).reshape(height, 1 + width)
    return None if rows[:, 0].any() else rows[:, 1:]


def _image_data(data: bytes) -> bytes:
    """The compressed pixels, which may be in several chunks."""
    parts = [data[start:end] for kind, start, end in png_chunks(data) if kind == b"IDAT"]
    return parts[0] if len(parts) == 1 else b"".join(parts)
