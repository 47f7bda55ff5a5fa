"""A PNG writer of every kind that the format allows, and PNGs and EXIF to read back."""

import struct
import zlib
from collections.abc import Iterator
from itertools import cycle

import numpy as np

from tests.data.pictures import chunk, png

KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16)]
KINDS += [(6, 8), (6, 16)]
"""Colour type and depth."""
NUM_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def write_png(
    samples: np.ndarray,
    color: int,
    depth: int,
    *,
    interlaced: bool = False,
    filters: list[int] | None = None,
    before: bytes = b"",
    after: bytes = b"",
    palette: np.ndarray | None = None,
) -> bytes:
    """Samples `(H, W, C)` as a PNG; `before` and `after` are chunks around its pixels."""
    height, width, _ = samples.shape
    parts = [samples[top::down, left::right] for top, left, down, right in _PASSES] if interlaced else [samples]
    next_filter = cycle(filters or [0])
    rows = b"".join(row for part in parts if part.size for row in _rows(part, depth, next_filter))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    colors = chunk(b"PLTE", palette.tobytes()) if palette is not None else b""
    return png(header, colors, before, chunk(b"IDAT", zlib.compress(rows)), after)


def _rows(part: np.ndarray, depth: int, filters: Iterator[int]) -> Iterator[bytes]:
    """Each row as its filter's number and its bytes."""
    step = max(1, part.shape[2] * depth // 8)
    previous = None
    for row in part.reshape(len(part), -1):
        packed = np.frombuffer(_packed(row, depth), np.uint8).astype(int)
        above = np.zeros_like(packed) if previous is None else previous
        left, corner = (np.concatenate([np.zeros(step, int), line])[: len(packed)] for line in (packed, above))
        guess = left + above - corner
        near = [abs(guess - line) for line in (left, above, corner)]
        paeth = np.select([(near[0] <= near[1]) & (near[0] <= near[2]), near[1] <= near[2]], [left, above], corner)
        number = next(filters)
        predicted = (0, left, above, (left + above) // 2, paeth)[number]
        yield bytes([number]) + ((packed - predicted) % 256).astype(np.uint8).tobytes()
        previous = packed


def _packed(row: np.ndarray, depth: int) -> bytes:
    if depth == 16:
        return row.astype(">u2").tobytes()
    bits = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
    return np.packbits(bits.ravel()).tobytes()


def exif(orientation: int, *, order: str = ">", entries: bytes = b"") -> bytes:
    """A block of EXIF that names an orientation after other entries of 12 bytes each."""
    mark = {">": b"MM\0*", "<": b"II*\0"}[order]
    count = len(entries) // 12 + 1
    entry = struct.pack(f"{order}HHIHH", 0x112, 3, 1, orientation, 0)
    return mark + struct.pack(f"{order}IH", 8, count) + entries + entry + bytes(4)


def jpeg_with_exif(data: bytes, block: bytes) -> bytes:
    """A JPEG with EXIF after its first marker."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + data[2:]


def webp_with_exif(data: bytes, block: bytes, size: tuple[int, int], *, mark: bytes = b"") -> bytes:
    """A plain WebP with EXIF after its pixels."""
    height, width = size
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    block = mark + block
    parts = b"VP8X" + struct.pack("<I", 10) + b"\x08\0\0\0" + canvas + data[12:]
    parts += b"EXIF" + struct.pack("<I", len(block)) + block + b"\0" * (len(block) % 2)
    return b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WEBP" + parts
