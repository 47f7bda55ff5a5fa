"""Small images and labels, and the bytes of PNGs that no encoder would write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from iccld.data.images.grey_png import SIGNATURE

HEIGHT, WIDTH = 45, 58


def picture() -> np.ndarray:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[20:30] = 90
    return image


def ids() -> np.ndarray:
    blocks = np.random.default_rng(1).choice(np.array([*range(19), 255], np.uint8), (HEIGHT // 4 + 1, WIDTH // 4 + 1))
    return blocks.repeat(4, 0).repeat(4, 1)[:HEIGHT, :WIDTH]


def encode(array: np.ndarray, format_name: str, *, mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(array)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format_name, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header: bytes, *chunks: bytes) -> bytes:
    return b"".join([SIGNATURE, chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


def interlaced(image: np.ndarray) -> bytes:
    """PIL reads Adam7 and does not write it."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for top, left, down, right in passes:
        for row in image[top::down, left::right]:
            rows += b"\0" + row.tobytes()
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 1)
    return png(header, chunk(b"IDAT", zlib.compress(rows)))


IMAGES = {
    "jpeg": encode(picture(), "jpeg", quality=90, subsampling="4:2:0"),
    "jpeg 4:4:4": encode(picture(), "jpeg", quality=95, subsampling="4:4:4"),
    "progressive jpeg": encode(picture(), "jpeg", progressive=True),
    "png": encode(picture(), "png"),
    "interlaced png": interlaced(picture()),
    "palettised png": encode(picture(), "png", mode="P"),
    "grey png": encode(ids(), "png"),
    "png with alpha": encode(picture(), "png", mode="RGBA"),
    "webp": encode(picture(), "webp"),
    "lossless webp": encode(picture(), "webp", lossless=True),
}
