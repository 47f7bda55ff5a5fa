"""Every kind of PNG that there is: the samples that are read are those that were written."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.data.images.decode import Window, decode_channels, decode_image, decode_label, image_size
from iccld.data.images.png import read_samples
from iccld.data.sample import decode_train_ids, examine
from tests.data.pictures import chunk, ids, picture, png
from tests.data.png_writer import KINDS, NUM_CHANNELS, exif, write_png

FILTERS = st.lists(st.integers(0, 4), min_size=1, max_size=5)
ANCILLARY = {
    "gamma": chunk(b"gAMA", struct.pack(">I", 45455)),
    "broken profile": chunk(b"iCCP", b"x\0\0broken"),
    "long text": chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(bytes(3 << 20))),
    "colours": chunk(b"cICP", b"\x09\x10\0\1"),
    "damaged": b"\0\0\0\4pHYsabcdefgh",
    "animated": chunk(b"acTL", struct.pack(">II", 2, 0)),
}


def random_png(data: st.DataObject, color: int, depth: int) -> tuple[np.ndarray, bytes, np.ndarray]:
    """Samples, their PNG, and its palette."""
    height, width = data.draw(st.integers(1, 17)), data.draw(st.integers(1, 17))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    samples = generator.integers(0, 2**depth, (height, width, NUM_CHANNELS[color])).astype(np.uint16)
    palette = generator.integers(0, 256, (2 ** min(depth, 8), 3), dtype=np.uint8)
    choices = {"interlaced": data.draw(st.booleans()), "filters": data.draw(FILTERS)}
    encoded = write_png(samples, color, depth, palette=palette if color == 3 else None, **choices)
    return samples, encoded, palette


@pytest.mark.parametrize(("color", "depth"), KINDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_samples_that_were_written_are_read(color: int, depth: int, data: st.DataObject) -> None:
    samples, encoded, _ = random_png(data, color, depth)
    read = read_samples(encoded)
    assert read.dtype == (np.uint16 if depth == 16 else np.uint8)
    np.testing.assert_array_equal(read, samples)
    np.testing.assert_array_equal(decode_channels(encoded), samples)


@pytest.mark.parametrize(("color", "depth"), KINDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_images_are_scaled_as_the_format_says(color: int, depth: int, data: st.DataObject) -> None:
    samples, encoded, palette = random_png(data, color, depth)
    height, width, _ = samples.shape
    colors = samples[..., :1] if color in (0, 4) else samples[..., :3]
    expected = np.floor(colors * 255.0 / (2**depth - 1) + 0.5)
    expected = palette[samples[..., 0]] if color == 3 else np.broadcast_to(expected, (height, width, 3))
    image = decode_image(encoded)
    assert image.dtype == np.uint8 and image.shape == (height, width, 3)
    np.testing.assert_array_equal(image, expected)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    window = Window(top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    part = expected[top : top + window.height, left : left + window.width]
    np.testing.assert_array_equal(decode_image(encoded, window=window), part)


@pytest.mark.parametrize(("color", "depth"), KINDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_labels_are_the_ids_that_were_written(color: int, depth: int, data: st.DataObject) -> None:
    """Several channels that say the same id, too."""
    height, width = data.draw(st.integers(1, 17)), data.draw(st.integers(1, 17))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    train_ids = generator.choice([i for i in (*range(19), 255) if i < 2**depth], (height, width)).astype(np.uint16)
    samples = np.repeat(train_ids[..., None], NUM_CHANNELS[color], 2)
    if color in (4, 6):
        samples[..., -1] = 2**depth - 1
    palette = generator.integers(0, 256, (2 ** min(depth, 8), 3), dtype=np.uint8) if color == 3 else None
    interlaced, filters = data.draw(st.booleans()), data.draw(FILTERS)
    encoded = write_png(samples, color, depth, palette=palette, interlaced=interlaced, filters=filters)
    np.testing.assert_array_equal(decode_label(encoded), train_ids)
    read = decode_train_ids(encoded, (height, width), num_classes=19)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, train_ids)
    counts = [int((train_ids == i).sum()) for i in range(19)]
    assert examine(encoded, encoded, num_classes=19)[2].tolist() == counts


@pytest.mark.parametrize(("color", "depth"), [kind for kind in KINDS if kind[0] != 3])
def test_the_colour_that_counts_as_transparent_changes_nothing(color: int, depth: int) -> None:
    samples = np.ones((5, 6, NUM_CHANNELS[color]), np.uint16)
    transparent = chunk(b"tRNS", struct.pack(">H", 1) * (1 if color == 0 else 3))
    with_it, without = (write_png(samples, color, depth, before=before) for before in (transparent, b""))
    np.testing.assert_array_equal(decode_image(with_it), decode_image(without))
    np.testing.assert_array_equal(read_samples(with_it), samples)


@pytest.mark.parametrize("name", ANCILLARY)
@pytest.mark.parametrize("place", ["before", "after"])
def test_what_pixels_do_not_depend_on_is_passed_over(name: str, place: str) -> None:
    encoded = write_png(picture().astype(np.uint16), 2, 8, **{place: ANCILLARY[name]})
    np.testing.assert_array_equal(decode_image(encoded), picture())
    label = write_png(ids()[..., None], 0, 8, filters=[1], **{place: ANCILLARY[name]})
    np.testing.assert_array_equal(decode_label(label), ids())


def test_bytes_after_the_end_are_passed_over() -> None:
    for tail in (bytes(1 << 22), b"\0\0\xff\xffeXIf" + exif(6), b"<html>"):
        np.testing.assert_array_equal(decode_image(write_png(picture(), 2, 8) + tail), picture())


def test_pixels_in_many_chunks() -> None:
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in picture()))
    parts = [chunk(b"IDAT", rows[i : i + 7]) for i in range(0, len(rows), 7)]
    header = struct.pack(">IIBBBBB", *picture().shape[1::-1], 8, 2, 0, 0, 0)
    np.testing.assert_array_equal(decode_image(png(header, *parts)), picture())
    with pytest.raises(ValueError, match="it has more than 262144 chunks"):
        decode_image(png(header, chunk(b"IDAT", b"") * (1 << 18)))


@pytest.mark.parametrize(("color", "depth"), [(1, 8), (5, 8), (2, 4), (3, 16), (4, 4), (6, 1), (0, 3), (0, 0), (7, 8)])
def test_kinds_that_there_are_not(color: int, depth: int) -> None:
    header = struct.pack(">IIBBBBB", 4, 4, depth, color, 0, 0, 0)
    for read in (decode_image, decode_label, image_size):
        with pytest.raises(
            ValueError, match=rf"colour type {color} with {depth} bits a sample, which the format does not know"
        ):
            read(png(header, chunk(b"IDAT", zlib.compress(bytes(999)))))


def test_channels_that_say_several_ids_are_refused() -> None:
    grey = np.full((3, 3, 1), 7, np.uint16)
    with pytest.raises(ValueError, match="it has several channels, which differ"):
        decode_label(write_png(np.dstack([grey, grey, grey + 1]), 2, 8))
    for channels in ([grey, grey], [grey, grey, grey, grey + 248 - 1]):
        color = {2: 4, 4: 6}[len(channels)]
        with pytest.raises(ValueError, match="it has transparent pixels"):
            decode_label(write_png(np.dstack(channels), color, 8))
