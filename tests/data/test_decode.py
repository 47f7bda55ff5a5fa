"""Decoding: every window equals the whole image's, labels survive any encoding, hostile bytes are refused cheaply."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iccld.data import decode
from iccld.data.decode import DECODE_ERRORS, MAX_PIXELS, Window, decode_image, decode_label, image_size
from iccld.data.grey_png import encode_grey_png
from tests.data.pictures import HEIGHT, WIDTH, chunk, encode, ids, picture, png

WINDOWS = st.tuples(st.integers(1, HEIGHT), st.integers(1, WIDTH)).flatmap(
    lambda size: st.builds(
        Window, st.integers(0, HEIGHT - size[0]), st.integers(0, WIDTH - size[1]), st.just(size[0]), st.just(size[1])
    )
)


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
    with pytest.raises(DECODE_ERRORS):
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
    for read in (decode_image, decode_label, image_size):
        with pytest.raises(ValueError, match=r"it is no image of a known format \(JPEG, PNG, WebP\)"):
            read(data)


def test_pixels_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="mode I;16; images must have 8 bits a channel"):
        decode_image(encode(ids().astype(np.uint16), "png"))
    with pytest.raises(ValueError, match=r"several channels \(mode RGB\); labels must have one id a pixel"):
        decode_label(IMAGES["png"])


def lying_header(data: bytes, at: int, size: bytes) -> bytes:
    return data[:at] + size + data[at + len(size) :]


def huge() -> dict[str, bytes]:
    """Small files whose headers announce more than MAX_PIXELS."""
    jpeg_size_at = IMAGES["jpeg"].index(b"\xff\xc0") + 5
    animation = encode(picture(), "webp", save_all=True, append_images=[Image.fromarray(picture()[::-1])])
    header = lying_header(IMAGES["png"][:33], 16, struct.pack(">II", 60_000, 60_000))
    return {
        "jpeg": lying_header(IMAGES["jpeg"], jpeg_size_at, struct.pack(">HH", 65_000, 65_000)),
        "png": png(header[16:29], IMAGES["png"][33:]),
        "grey png": png(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0), encode_grey_png(ids())[33:]),
        "webp": lying_header(animation, 24, b"\xff\xff\x00\xff\xff\x00"),
    }


@pytest.mark.parametrize("name", huge())
def test_absurd_sizes_are_refused_by_the_header(name: str) -> None:
    with pytest.raises(ValueError, match=r"pixels; an image may have 1 to 67108864|it is too large"):
        decode_image(huge()[name])


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    for read in (decode_image, decode_label, image_size):
        with pytest.raises(ValueError, match=r"it has \d+ bytes; an image may have 100"):
            read(IMAGES["png"])


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = IMAGES["progressive jpeg"]
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match=r"it has 1\d\d scans; a JPEG may have 100"):
        decode_image(data[:-2] + data[last:-2] * 120 + data[-2:])


BOMB = """
import resource, struct, zlib
import psutil
from tests.data.pictures import chunk, png
from iccld.data.decode import DECODE_ERRORS, decode_image, decode_label, image_size
compressor = zlib.compressobj()
zeros = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush()
header = lambda side, color: struct.pack(">IIBBBBB", side, side, 8, color, 0, 0, 0)
bombs = [
    png(header(40, 0), chunk(b"IDAT", zeros)),
    png(header(40, 2), chunk(b"IDAT", zeros)),
    png(header(40, 2), chunk(b"zTXt", b"a\\0\\0" + zeros), chunk(b"IDAT", zeros)),
    png(header(40, 2), chunk(b"iCCP", b"a\\0\\0" + zeros), chunk(b"IDAT", zeros)),
    png(header(40, 0), chunk(b"iTXt", b"a\\0\\1\\0\\0\\0" + zeros), chunk(b"IDAT", zeros)),
]
del zeros
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (100 << 20),) * 2)
for bomb in bombs:
    for read in (decode_image, decode_label, image_size):
        try:
            read(bomb)
        except DECODE_ERRORS:
            pass
"""


def test_bombs_take_little_memory() -> None:
    """Each would grow to 256 MiB; 100 are allowed."""
    subprocess.run([sys.executable, "-c", BOMB], check=True)


def damage(data: bytes, draw: st.DataObject) -> bytes:
    """Cut, with bytes changed, removed or put in; the first ones, where headers are, most often."""
    broken = bytearray(data)
    if draw.draw(st.booleans()):
        del broken[draw.draw(st.integers(0, len(broken))) :]
    for _ in range(draw.draw(st.integers(0, 4))):
        if not broken:
            break
        at = draw.draw(st.integers(0, len(broken) - 1) | st.integers(0, min(60, len(broken) - 1)))
        size = draw.draw(st.integers(0, 2))
        broken[at : at + size] = draw.draw(st.binary(max_size=4))
    return bytes(broken)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*IMAGES, "unfiltered", "16 bits"])
@given(draw=st.data())
@settings(max_examples=60, deadline=None)
def test_damage_raises_nothing_but_decode_errors(name: str, draw: st.DataObject) -> None:
    labels = {"unfiltered": encode_grey_png(ids()), "16 bits": encode(ids().astype(np.uint16), "png")}
    broken = damage({**IMAGES, **labels}[name], draw)
    for read in (decode_image, decode_label, image_size, lambda data: decode_image(data, window=Window(8, 9, 20, 30))):
        try:
            result = read(broken)
        except DECODE_ERRORS as error:
            assert str(error)
        else:
            assert isinstance(result, tuple) or result.size <= 3 * MAX_PIXELS
