"""A stored image fits its label for every reader: it is upright, and no EXIF tag says otherwise."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.data.images.decode import decode_image
from iccld.data.shards.indexing import build_index
from iccld.data.shards.packing import ImageFormat
from iccld.data.shards.verifying import verify_shards
from tests.data.factory import members, opened, random_pair, write_tar
from tests.data.pictures import chunk, encode
from tests.data.png_writer import exif, jpeg_with_exif, webp_with_exif, write_png
from tests.data.shards.test_making import make

TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}


def photo(kind: str, pixels: np.ndarray, orientation: int) -> bytes:
    stored = np.array(Image.fromarray(pixels).transpose(TURNS[orientation]))
    if kind == "png":
        return write_png(stored, 2, 8, after=chunk(b"eXIf", exif(orientation)))
    if kind == "webp":
        plain = encode(stored, "webp", lossless=True)
        return webp_with_exif(plain, exif(orientation), (stored.shape[0], stored.shape[1]))
    return jpeg_with_exif(encode(stored, "jpeg", quality=100, subsampling="4:4:4"), exif(orientation))


def folder(root: Path, suffix: str, image: bytes, label: bytes) -> Path:
    for name, data in ((f"images/a.{suffix}", image), ("labels/a.png", label)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_turned_photos_are_stored_upright(
    tmp_path: Path, suffix: str, orientation: int, image_format: ImageFormat
) -> None:
    blocks, ids = random_pair(0)
    pixels = np.array(Image.fromarray(blocks).resize((8, 6)).resize(blocks.shape[1::-1], Image.Resampling.BICUBIC))
    raw = folder(tmp_path / "raw", suffix, photo(suffix, pixels, orientation), encode(ids, "png"))
    index = opened(make(raw, image_format=image_format))
    image, label = members(index, 0)
    with Image.open(io.BytesIO(image)) as stored:  # as any reader of shards sees it
        assert stored.getexif().get(0x112, 1) == 1
        assert (stored.format or "").lower().replace("jpeg", "jpg") == (
            suffix if image_format is ImageFormat.KEEP else image_format.value
        )
        assert np.abs(np.array(stored.convert("RGB")).astype(int) - pixels).max() < 40
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(label))), ids)
    assert not verify_shards(index.location, progress=lambda line: None).problems


@pytest.mark.parametrize(
    ("orientation", "of_label", "width", "is_said"),
    [(3, 1, 32, True), (7, 1, 32, False), (6, 1, 24, True), (3, 3, 32, False), (1, 3, 32, True), (6, 7, 32, True)],
)
def test_photos_that_were_turned_without_their_labels_are_counted(
    tmp_path: Path, orientation: int, of_label: int, width: int, is_said: bool
) -> None:
    pixels, ids = (array[:, :width] for array in random_pair(0))
    turned = {1: lambda array: array} | {
        n: lambda array, n=n: np.array(Image.fromarray(array).transpose(TURNS[n])) for n in TURNS
    }
    image = write_png(turned[orientation](pixels), 2, 8, after=chunk(b"eXIf", exif(orientation)))
    label = write_png(turned[of_label](ids)[..., None], 0, 8, after=chunk(b"eXIf", exif(of_label)))
    lines, raw = list[str](), folder(tmp_path / "raw", "png", image, label)
    made = opened(make(raw, image_format=ImageFormat.KEEP, progress=lines.append))
    what = "photos are turned upright by EXIF but not their labels, or the reverse (check that the two fit), such as"
    assert [line for line in lines if "EXIF" in line] == [f"1 {what} {raw}/images/a.png"] * is_said
    packed = write_tar(tmp_path / "tars" / "x.tar", {"a.png": image, "a.label.png": label})
    indexed = build_index(packed.parent, progress=lines.append)
    assert indexed.passed_over.lines() == [f"1 {what} x.tar: a"] * is_said and len(opened(indexed)) == len(made)


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3)])
def test_images_of_12_bits_in_16_are_counted_and_keep_their_values(tmp_path: Path, color: int, channels: int) -> None:
    values, ids = np.linspace(0, 4095, 768 * channels).astype(np.uint16).reshape(24, 32, channels), random_pair(0)[1]
    raw = folder(tmp_path / "raw", "png", write_png(values, color, 16), encode(ids, "png"))
    for scale, number in ((1, 1), (16, 0)):
        lines = list[str]()
        (raw / "images" / "a.png").write_bytes(write_png(values * np.uint16(scale), color, 16))
        index = opened(make(raw, progress=lines.append, output=str(tmp_path / f"{scale}")))
        assert decode_image(members(index, 0)[0]).max() == 16 * scale - (scale > 1)
        assert [line for line in lines if "almost black" in line] == [
            f"1 images of 16 bits are almost black: no value is above 1/15 of the range (scale those of 10 or 12 bits "
            f"first), such as {raw}/images/a.png"
        ] * number


@pytest.mark.parametrize("tail", [b"\0\0\0", b"\0\0\0\x18ftypmp42" + bytes(2000)])
def test_keep_copies_bytes_after_the_end_too(tmp_path: Path, tail: bytes) -> None:
    pixels, ids = random_pair(0)
    data = jpeg_with_exif(encode(pixels, "jpeg"), exif(1)) + tail
    index = opened(make(folder(tmp_path / "raw", "jpg", data, encode(ids, "png")), image_format=ImageFormat.KEEP))
    assert members(index, 0)[0] == data
    assert not verify_shards(index.location, progress=lambda line: None).problems


def test_a_label_that_is_a_jpeg_is_called_so(tmp_path: Path) -> None:
    pixels, ids = random_pair(0)
    result = make(folder(tmp_path / "raw", "png", encode(pixels, "png"), encode(ids, "jpeg")))
    [problem] = result.problems
    assert "it is a JPEG, which keeps colours roughly and ids not at all; export labels as PNG" in str(problem)


def test_colours_in_a_jpeg_are_no_ids(tmp_path: Path) -> None:
    pixels, _ = random_pair(0)
    table = tmp_path / "own.yaml"
    table.write_text("images: images/{n}.png\nlabels: labels/{n}.png\nlabels_as: colors\nids: {'0 0 0': 0}\n")
    black = encode(np.zeros_like(pixels), "jpeg")
    [problem] = make(folder(tmp_path / "raw", "png", encode(pixels, "png"), black), dataset=str(table)).problems
    assert "it is a JPEG, which keeps colours roughly" in str(problem)
