"""Small images and labels, and the bytes of PNGs that no encoder would write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from iccld.data.grey_png import SIGNATURE

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
