"""JPEGs as cameras and scanners write them: read as PIL reads them, by their own headers."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iccld.data.images.decode import Window, decode_image, decode_label, image_size
from iccld.data.images.jpeg import count_scans, only_pixels, read_jpeg_header
from tests.data.pictures import HEIGHT, IMAGES, WIDTH, encode, ids, picture
from tests.data.png_writer import exif, jpeg_with_exif

SCANS = IMAGES["progressive jpeg"][IMAGES["progressive jpeg"].index(b"\xff\xda") : -2]
TAILS = {
    "padding": bytes(3),
    "a new line": b"\r\n",
    "a film": b"\0\0\0\x18ftypmp42" + bytes(2000),
    "a second picture": IMAGES["jpeg"],
    "many scans": SCANS * 120,
    "many ends": b"\xff\xd9" * 9,
}


@pytest.mark.parametrize("kind", ["jpeg", "jpeg 4:4:4", "progressive jpeg"])
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_bytes_after_the_end_are_passed_over(kind: str, tail: bytes) -> None:
    data = IMAGES[kind] + tail
    np.testing.assert_array_equal(decode_image(data), decode_image(IMAGES[kind]))
    window = Window(4, 5, 20, 30)
    np.testing.assert_array_equal(decode_image(data, window=window), decode_image(IMAGES[kind], window=window))
    assert image_size(data) == (HEIGHT, WIDTH)


@given(tail=st.binary(max_size=50))
@settings(max_examples=50)
def test_any_bytes_after_the_end_are_passed_over(tail: bytes) -> None:
    np.testing.assert_array_equal(decode_image(IMAGES["jpeg"] + tail), decode_image(IMAGES["jpeg"]))


def test_several_pictures_in_a_file_are_read_as_the_first() -> None:
    others = [Image.fromarray(picture()[::-1]), Image.fromarray(picture()[:, ::-1])]
    data = encode(picture(), "mpo", save_all=True, append_images=others)
    assert np.abs(decode_image(data).astype(int) - decode_image(encode(picture(), "jpeg"))).max() <= 60
    np.testing.assert_array_equal(decode_image(data), np.array(Image.open(io.BytesIO(data))))


def test_scans_are_counted_up_to_the_end_of_the_picture() -> None:
    data = jpeg_with_exif(IMAGES["progressive jpeg"], exif(1) + b"\xff\xda" * 200)
    num_scans = IMAGES["progressive jpeg"].count(b"\xff\xda")
    assert 5 < num_scans < 20
    for tail in (b"", SCANS * 20):
        assert count_scans(data + tail, read_jpeg_header(data), at_most=100) == num_scans
    np.testing.assert_array_equal(decode_image(data), decode_image(IMAGES["progressive jpeg"]))


@pytest.mark.parametrize("options", [{"mode": "CMYK"}, {"mode": "L"}, {"mode": "YCbCr"}, {"keep_rgb": True}])
@pytest.mark.parametrize("restart", [0, 1])
def test_colours_are_those_of_pil(options: dict[str, object], restart: int) -> None:
    data = encode(picture(), "jpeg", restart_marker_rows=restart, **options)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data), expected)


@pytest.mark.parametrize(("subsampling", "code"), [("4:2:0", 0x22), ("4:2:0", 0x41), ("4:2:0", 0x14), ("4:2:2", 0x12)])
def test_samplings_with_and_without_a_name_are_read(subsampling: str, code: int) -> None:
    """The header's sampling counts, which places the blocks elsewhere; the picture is PIL's."""
    data = bytearray(encode(np.resize(picture(), (64, 64, 3)), "jpeg", subsampling=subsampling))
    data[data.index(b"\xff\xc0") + 11] = code
    expected = np.array(Image.open(io.BytesIO(bytes(data))))
    np.testing.assert_array_equal(decode_image(bytes(data)), expected)


def test_other_depths_and_lossless_jpegs_are_named() -> None:
    at = IMAGES["jpeg"].index(b"\xff\xc0")
    twelve = IMAGES["jpeg"][: at + 4] + b"\x0c" + IMAGES["jpeg"][at + 5 :]
    with pytest.raises(ValueError, match="it is a JPEG of 12 bits a sample; export it as a usual one, or as PNG"):
        decode_image(twelve)
    with pytest.raises(ValueError, match="it is a JPEG without the usual compression"):
        decode_image(IMAGES["jpeg"].replace(b"\xff\xc0", b"\xff\xc3", 1))


@pytest.mark.parametrize("size", [1, 10, 200, 700, -1, -2, -100])
def test_what_is_cut_off_is_no_image(size: int) -> None:
    with pytest.raises(ValueError):
        decode_image(IMAGES["jpeg"][:size])


PADDED = {
    "in the header": lambda data: data[:20] + b"\0\1\2" + data[20:],
    "before the end": lambda data: data[:-2] + bytes(500) + data[-2:],
    "before the end, of 255": lambda data: data[:-2] + b"\xff" * 9 + data[-2:],
    "everywhere": lambda data: data[:20] + bytes(7) + data[20:-2] + bytes(7) + data[-2:] + bytes(7),
}


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg"])
@pytest.mark.parametrize("pad", PADDED.values(), ids=PADDED)
def test_padding_within_is_passed_over(kind: str, pad: Callable[[bytes], bytes]) -> None:
    np.testing.assert_array_equal(decode_image(pad(IMAGES[kind])), decode_image(IMAGES[kind]))


@given(at=st.integers(1000, len(IMAGES["jpeg"]) - 10), size=st.integers(8, 400))
def test_pixels_that_are_missing_are_not_taken_for_padding(at: int, size: int) -> None:
    """A download that broke off, with its end mark, and one in a file that was as long as it should be."""
    for data in (IMAGES["jpeg"][:at] + IMAGES["jpeg"][-2:], IMAGES["jpeg"][:at] + bytes(size)):
        with pytest.raises(ValueError):
            decode_image(data)


@given(seed=st.integers(0, 10**6), quality=st.integers(1, 100), side=st.integers(1, 40))
@settings(deadline=None)
def test_the_bytes_that_pixels_depend_on_suffice(seed: int, quality: int, side: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (side, 40, 3), dtype=np.uint8)
    data = jpeg_with_exif(encode(image, "jpeg", quality=quality, progressive=seed % 2 == 1), exif(1))
    bare = only_pixels(data, read_jpeg_header(data))
    assert len(bare) < len(data)
    np.testing.assert_array_equal(decode_image(bare), decode_image(data))


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_lossy_formats_are_no_labels(name: str) -> None:
    with pytest.raises(ValueError, match=r"it is a (JPEG|lossy WebP), which keeps colours roughly and ids not at all"):
        decode_label(encode(ids(), name))


def test_a_lossless_webp_is_a_label() -> None:
    np.testing.assert_array_equal(decode_label(encode(ids(), "webp", lossless=True)), ids())


def test_two_headers_are_refused() -> None:
    at = IMAGES["jpeg"].index(b"\xff\xc0")
    frame = IMAGES["jpeg"][at : at + 19]
    small = frame[:5] + struct.pack(">HH", 8, 8) + frame[9:]
    with pytest.raises(ValueError):
        decode_image(IMAGES["jpeg"][:at] + small + IMAGES["jpeg"][at:])
