"""PNGs of one byte a pixel whose rows are stored without filters: the fastest labels to read, for any reader.

Encoders usually predict pixels from their neighbours (PNG's filters). That helps photographs: it makes maps of ids no
smaller, and undoing it takes most of the time of reading them.
"""

import struct
import zlib

import numpy as np

from iccld.data import deflate
from iccld.data.images.png import GREY, PALETTE, SIGNATURE, png_chunks

_COMPRESSION_LEVEL = 6


def encode_grey_png(ids: np.ndarray) -> bytes:
    """Encode `(H, W)` uint8 as an 8-bit greyscale PNG without filters."""
    height, width = ids.shape
    rows = np.zeros((height, 1 + width), np.uint8)  # each row begins with the number of its filter: 0, none
    rows[:, 1:] = ids
    header = struct.pack(">IIBBBBB", width, height, 8, GREY, 0, 0, 0)
    pixels = deflate.compress(rows, _COMPRESSION_LEVEL)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decode_grey_png(data: bytes) -> np.ndarray | None:
    """Decode a PNG as `encode_grey_png` writes them to its `(H, W)` uint8 values or palette indices.

    Returns None for any other PNG and for a broken one, which another reader will explain. The array is read-only.
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
    """Return the compressed pixels, which may be in several chunks."""
    parts = [data[start:end] for kind, start, end in png_chunks(data) if kind == b"IDAT"]
    return parts[0] if len(parts) == 1 else b"".join(parts)
