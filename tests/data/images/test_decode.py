"""Decoding: every window equals the whole image's, labels survive any encoding, other formats are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iccld.data.images.decode import Window, decode_image, decode_label, image_size
from iccld.data.images.grey_png import encode_grey_png
from tests.data.pictures import HEIGHT, IMAGES, WIDTH, chunk, encode, ids, picture, png

WINDOWS = st.tuples(st.integers(1, HEIGHT), st.integers(1, WIDTH)).flatmap(
    lambda size: st.builds(
        Window, st.integers(0, HEIGHT - size[0]), st.integers(0, WIDTH - size[1]), st.just(size[0]), st.just(size[1])
    )
)


@pytest.mark.parametrize("name", IMAGES)
@given(window=WINDOWS)
@settings(max_examples=25, deadline=None)
def test_a_window_has_the_pixels_of_the_whole(name: str, window: Window) -> None:
    top, left, height, width = window
    whole = decode_image(IMAGES[name])
    assert whole.shape == (HEIGHT, WIDTH, 3) and whole.dtype == np.uint8
    part = decode_image(IMAGES[name], window=window)
    np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("name", ["png", "interlaced png", "lossless webp"])
def test_lossless_formats_give_the_pixels_back(name: str) -> None:
    np.testing.assert_array_equal(decode_image(IMAGES[name]), picture())


def test_a_jpeg_is_decoded_as_pil_decodes_it() -> None:
    reference = np.array(Image.open(io.BytesIO(IMAGES["jpeg"])))
    np.testing.assert_array_equal(decode_image(IMAGES["jpeg"]), reference)


@pytest.mark.parametrize("name", IMAGES)
def test_the_size_is_read_from_the_header(name: str) -> None:
    assert image_size(IMAGES[name]) == (HEIGHT, WIDTH)


def test_a_png_is_not_decoded_below_the_window() -> None:
    """Otherwise damage there would be an error."""
    rows = b"".join(b"\0" + row.tobytes() for row in picture()[:20]) + b"\x09" * (WIDTH * 3 + 1) * (HEIGHT - 20)
    data = png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0), chunk(b"IDAT", zlib.compress(rows)))
    np.testing.assert_array_equal(decode_image(data, window=Window(4, 5, 16, 7)), picture()[4:20, 5:12])
    with pytest.raises(ValueError):
        decode_image(data)


@pytest.mark.parametrize(
    "window", [Window(-1, 0, 4, 4), Window(0, -1, 4, 4), Window(HEIGHT - 3, 0, 4, 4), Window(0, WIDTH - 3, 4, 4)]
)
@pytest.mark.parametrize("name", ["jpeg", "png"])
def test_a_window_outside_is_refused(name: str, window: Window) -> None:
    with pytest.raises(ValueError, match=r"it has 45x58 pixels, in which Window\(top=.*\) does not lie"):
        decode_image(IMAGES[name], window=window)


@pytest.mark.parametrize("name", ["unfiltered", "grey", "palettised", "stored"])
def test_labels_survive_any_encoding(name: str) -> None:
    labels = Image.fromarray(ids())
    if name == "palettised":  # indices, not colours
        labels = Image.frombytes("P", labels.size, labels.tobytes())
        labels.putpalette([value * 7 % 256 for value in range(768)])
    buffer = io.BytesIO()
    labels.save(buffer, "png", compress_level=0 if name == "stored" else 6)
    data = encode_grey_png(ids()) if name == "unfiltered" else buffer.getvalue()
    np.testing.assert_array_equal(decode_label(data), ids())


def test_labels_of_16_bits_keep_them() -> None:
    wide = ids().astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_label(encode(wide, "png")), wide)


@pytest.mark.parametrize("format_name", ["gif", "tiff", "bmp", "ppm", "pcx", "ico", "tga"])
def test_other_formats_are_not_even_tried(format_name: str) -> None:
    data = encode(picture(), format_name)
    known = format_name in ("gif", "tiff", "bmp", "ppm")
    message = f"it is a {format_name.upper()}; JPEG, PNG, WebP can be read" if known else "it is no image of a known"
    for read in (decode_image, decode_label, image_size):
        with pytest.raises(ValueError, match=message):
            read(data)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"\r\n<!DOCTYPE html><html>", "a page of the web"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIF or AVIF image"),
        (b"", "it is empty"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(data: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        decode_image(data)
