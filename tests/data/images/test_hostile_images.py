"""Damaged and hostile images: refused by their headers, cheaply, and with nothing but ValueError."""

import contextlib
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iccld.data.images import decode
from iccld.data.images.decode import MAX_PIXELS, Window, as_value_errors, decode_image, decode_label, image_size
from iccld.data.images.grey_png import encode_grey_png
from iccld.data.shards.converters.readers import read_red16
from tests.data.pictures import HEIGHT, IMAGES, WIDTH, chunk, encode, ids, picture, png


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
    with pytest.raises(ValueError, match=r"pixels; an image may have 1 to 67108864|DecompressionBombError"):
        decode_image(huge()[name])


READERS = {
    "image": decode_image,
    "window": lambda data: decode_image(data, window=Window(2, 3, 16, 16)),
    "label": decode_label,
    "red16": lambda data: read_red16(data, {0: 0}),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("side", [44, 9_000])
def test_two_headers_are_refused(read: Callable[[bytes], object], side: int) -> None:
    """PIL believes the last one."""
    depth = 16 if read is READERS["red16"] else 8
    headers = [struct.pack(">IIBBBBB", length, length, depth, 2, 0, 0, 0) for length in (40, side)]
    data = png(headers[0], chunk(b"IHDR", headers[1]), chunk(b"IDAT", zlib.compress(bytes(44 * (1 + 6 * 44)))))
    with pytest.raises(ValueError, match="it has several headers"):
        read(data)


@pytest.mark.parametrize("read", [*READERS.values(), image_size], ids=[*READERS, "size"])
def test_a_png_begins_with_its_header(read: Callable[[bytes], object]) -> None:
    data = IMAGES["png"]
    for bad in (data[:8] + chunk(b"tEXt", bytes(13)) + data[8:], data[:20], data[:8]):
        with pytest.raises(ValueError, match="it does not begin with a PNG's header"):
            read(bad)


def test_the_frames_of_an_animated_png_do_not_count() -> None:
    """Pixels fill the whole image; PIL would draw only what the first frame covers, and leave the rest black."""
    frame = struct.pack(">IIIIIHHBB", 0, WIDTH, 3, 0, 0, 0, 0, 0, 0)
    chunks = chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", frame), IMAGES["png"][33:]
    animated = png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0), *chunks)
    np.testing.assert_array_equal(decode_image(animated), picture())


def without_palette() -> bytes:
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 3, 0, 0, 0)
    return png(header, chunk(b"tRNS", b"\xff\0"), chunk(b"IDAT", zlib.compress(bytes(HEIGHT * (1 + WIDTH)))))


@pytest.mark.parametrize("read", [READERS["image"], READERS["window"]])
def test_indices_without_a_palette_are_no_image(read: Callable[[bytes], object]) -> None:
    with pytest.raises(ValueError, match="it has the indices of a palette, and no palette"):
        read(without_palette())


@pytest.mark.parametrize("library", ["PIL", "simplejpeg"])
def test_whatever_a_library_raises_is_an_error_of_the_file(library: str) -> None:
    with pytest.raises(ValueError, match=rf"{library} cannot read it \(KeyError: 'a'\)"), as_value_errors(library):
        raise KeyError("a")


def test_want_of_memory_is_no_error_of_the_file() -> None:
    with pytest.raises(MemoryError), as_value_errors("PIL"):
        raise MemoryError


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    for read in (*READERS.values(), image_size):
        with pytest.raises(ValueError, match=r"it has \d+ bytes; an image may have 100"):
            read(IMAGES["png"])


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = IMAGES["progressive jpeg"]
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match=r"it has 1\d\d scans; a JPEG may have 100"):
        decode_image(data[:-2] + data[last:-2] * 120 + data[-2:])


def endless() -> dict[str, bytes]:
    """Files of many megabytes that never come to the point."""
    jpeg, webp = IMAGES["jpeg"], IMAGES["lossless webp"]
    at = jpeg.index(b"\xff\xc0")
    parts = webp[12:] + bytes(8 << 20)
    return {
        "segments": jpeg[:at] + b"\xff\xe0\0\2" * (1 << 21) + jpeg[at:],
        "segments of cameras": jpeg[:at] + b"\xff\xe1\0\2" * (1 << 21) + jpeg[at:],
        "fill bytes": jpeg[:at] + b"\xff" * (8 << 20) + b"\0" + jpeg[at:],
        "fill bytes in a scan": jpeg[:-2] + (b"\xff" * (4 << 20) + b"\0") * 2 + jpeg[-2:] + b"\xff\xda" * 200,
        "segments in a scan": jpeg[:-2] + b"\xff\xe0\0\2" * (1 << 21) + b"\xff\xda" * 200,
        "markers": jpeg[:2] + b"\xff\x01" * (4 << 20) + jpeg[2:],
        "chunks": IMAGES["png"][:33] + chunk(b"eXIF", b"") * (1 << 20) + IMAGES["png"][33:],
        "parts": b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WEBP" + parts,
    }


@pytest.mark.parametrize("name", endless())
def test_files_that_never_come_to_the_point_take_little_time(name: str) -> None:
    data, start = endless()[name], time.process_time()
    for read in (decode_image, image_size):
        with contextlib.suppress(ValueError):
            read(data)
    assert time.process_time() - start < 3


BOMB = """
import resource, struct, zlib
import psutil
from tests.data.pictures import chunk, png
from iccld.data.images.decode import decode_image, decode_label, image_size
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
        except ValueError:
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
def test_damage_raises_nothing_but_value_errors(name: str, draw: st.DataObject) -> None:
    labels = {"unfiltered": encode_grey_png(ids()), "16 bits": encode(ids().astype(np.uint16), "png")}
    broken = damage({**IMAGES, **labels}[name], draw)
    for read in (decode_image, decode_label, image_size, lambda data: decode_image(data, window=Window(8, 9, 20, 30))):
        try:
            result = read(broken)
        except ValueError as error:
            assert str(error)
        else:
            assert isinstance(result, tuple) or result.size <= 3 * MAX_PIXELS
