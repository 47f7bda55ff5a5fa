"""Unfiltered grey PNGs: read by everyone; what is not quite one is left to PIL."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iccld.data.images.grey_png import decode_grey_png, encode_grey_png
from tests.data.pictures import HEIGHT, WIDTH, chunk, ids, png


@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 40), width=st.integers(1, 40), top=st.integers(1, 256))
@settings(max_examples=60, deadline=None)
def test_grey_pngs_are_read_by_everyone(seed: int, height: int, width: int, top: int) -> None:
    labels = np.random.default_rng(seed).integers(0, top, (height, width), dtype=np.uint8)
    data = encode_grey_png(labels)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.array(image), labels)
    read = decode_grey_png(data)
    assert read is not None
    np.testing.assert_array_equal(read, labels)


def test_a_grey_png_may_come_in_several_chunks() -> None:
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in ids()))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 0, 0, 0, 0)
    parts = [chunk(b"IDAT", rows[i : i + 50]) for i in range(0, len(rows), 50)]
    read = decode_grey_png(png(header, chunk(b"tEXt", b"a\0b"), *parts))
    assert read is not None and len(parts) > 2
    np.testing.assert_array_equal(read, ids())


@pytest.mark.parametrize("rows", [HEIGHT - 1, HEIGHT + 1, 5000 * HEIGHT])
def test_pixels_that_are_not_as_many_as_announced_are_left_to_pil(rows: int) -> None:
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 0, 0, 0, 0)
    assert decode_grey_png(png(header, chunk(b"IDAT", zlib.compress(b"\0" * (WIDTH + 1) * rows)))) is None


def test_pixels_that_fail_their_checksum_are_left_to_pil() -> None:
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 0, 0, 0, 0)
    stored = zlib.compress(b"".join(b"\0" + row.tobytes() for row in ids()), 0)
    for damaged in (stored[:-1], stored[:-1] + bytes([stored[-1] ^ 1]), stored[:60] + b"\7" + stored[61:]):
        assert decode_grey_png(png(header, chunk(b"IDAT", damaged))) is None
