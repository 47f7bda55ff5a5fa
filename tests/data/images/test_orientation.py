"""Photos of cameras held in any way: every reader sees them upright, as PIL shows them."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from iccld.data.images.decode import Window, decode_image, decode_label, image_size, is_upright
from iccld.data.images.orientation import read_orientation, upright
from tests.data.pictures import HEIGHT, IMAGES, WIDTH, chunk, ids, picture
from tests.data.png_writer import exif, jpeg_with_exif, webp_with_exif, write_png

SIZE = (HEIGHT, WIDTH)
WITH_EXIF: dict[str, Callable[[bytes], bytes]] = {
    "jpeg": lambda block: jpeg_with_exif(IMAGES["jpeg"], block),
    "progressive jpeg": lambda block: jpeg_with_exif(IMAGES["progressive jpeg"], block),
    "png": lambda block: write_png(picture(), 2, 8, before=chunk(b"eXIf", block)),
    "png, at its end": lambda block: write_png(picture(), 2, 8, after=chunk(b"eXIf", block)),
    "interlaced png": lambda block: write_png(picture(), 2, 8, interlaced=True, before=chunk(b"eXIf", block)),
    "webp": lambda block: webp_with_exif(IMAGES["lossless webp"], block, SIZE),
    "webp, marked": lambda block: webp_with_exif(IMAGES["lossless webp"], block, SIZE, mark=b"Exif\0\0"),
}


@pytest.mark.parametrize("name", WITH_EXIF)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_their_windows_are_upright(name: str, order: str, orientation: int) -> None:
    data = WITH_EXIF[name](exif(orientation, order=order))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data), expected)
    assert image_size(data) == expected.shape[:2]
    assert is_upright(data) == (orientation == 1)
    part = decode_image(data, window=Window(3, 5, 20, 30))
    np.testing.assert_array_equal(part, expected[3:23, 5:35])
    assert min(part.strides) > 0, "torch takes no other"


@pytest.mark.parametrize("filters", [[0], [1]])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_are_upright(orientation: int, filters: list[int]) -> None:
    data = write_png(ids()[..., None], 0, 8, filters=filters, after=chunk(b"eXIf", exif(orientation)))
    np.testing.assert_array_equal(decode_label(data), upright(ids(), orientation))


@given(orientation=st.integers(1, 8), height=st.integers(1, 5), width=st.integers(1, 5))
def test_turning_is_pils(orientation: int, height: int, width: int) -> None:
    pixels = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    image = Image.fromarray(pixels)
    image.getexif()[0x112] = orientation
    np.testing.assert_array_equal(upright(pixels, orientation), np.array(ImageOps.exif_transpose(image)))


@given(block=st.binary(max_size=80) | st.builds(lambda tail: exif(6)[:10] + tail, st.binary(max_size=60)))
@settings(max_examples=300)
def test_broken_exif_is_no_error(block: bytes) -> None:
    assert 1 <= read_orientation(block) <= 8


def test_only_a_sound_tag_counts() -> None:
    odd = b"".join(struct.pack(">HHI4s", tag, kind, 9, b"\xff" * 4) for tag, kind in ((0x11A, 2), (0x110, 12), (1, 99)))
    assert read_orientation(exif(6, entries=odd)) == 6
    assert [read_orientation(exif(value)) for value in (0, 9, 65535)] == [1, 1, 1]
    assert read_orientation(exif(6).replace(b"\1\x12\0\3\0\0\0\1\0\6", b"\1\x12\0\2\0\0\0\1\0\6")) == 1  # a text
    assert read_orientation(b"") == read_orientation(b"MM\0*\0\0\0\x08\xff\xff") == 1
