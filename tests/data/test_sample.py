"""One judge: what indexing and verifying take, training and scoring take, and the other way round."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from iccld.data.sample import count_classes, decode_train_ids, examine
from iccld.data.shards.indexing import build_index
from iccld.data.shards.verifying import verify_shards
from iccld.data.stream.stream import TrainingStream
from iccld.data.stream.validation import read_validation
from tests.data.factory import config, layout, png, seal
from tests.data.pictures import chunk, encode
from tests.data.png_writer import KINDS, NUM_CHANNELS, exif, jpeg_with_exif, write_png

HEIGHT, WIDTH = 24, 32
GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def grey(*values: int, depth: int = 8) -> bytes:
    return write_png(np.resize(np.array(values), (HEIGHT, WIDTH, 1)), 0, depth)


def kind(color: int, depth: int) -> bytes:
    samples = np.repeat(np.resize(np.array([0, 1]), (HEIGHT, WIDTH, 1)), NUM_CHANNELS[color], 2)
    if color in (4, 6):
        samples[..., -1] = 2**depth - 1
    return write_png(samples, color, depth, palette=IMAGE[0, :2] if color == 3 else None)


LABELS = {
    **{f"colour type {color}, depth {depth}": kind(color, depth) for color, depth in KINDS},
    "train ids": grey(0, 18, 255),
    "train ids of 16 bits": grey(0, 18, 255, depth=16),
    "nothing but 255": grey(255),
    "19": grey(19),
    "254": grey(0, 254),
    "256 of 16 bits": grey(256, depth=16),
    "65535 of 16 bits": grey(65535, depth=16),
    "too small": png(np.zeros((HEIGHT, WIDTH - 1), np.uint8)),
    "turned": write_png(np.zeros((WIDTH, HEIGHT, 1)), 0, 8, before=chunk(b"eXIf", exif(6))),
    "turned the wrong way": write_png(np.zeros((HEIGHT, WIDTH, 1)), 0, 8, before=chunk(b"eXIf", exif(6))),
    "JPEG": encode(np.zeros((HEIGHT, WIDTH), np.uint8), "jpeg"),
    "colours": png(IMAGE),
    "text": b"no image",
}
IMAGES = {
    "png": encode(IMAGE, "png"),
    "jpeg": encode(IMAGE, "jpeg"),
    "turned jpeg": jpeg_with_exif(encode(IMAGE.swapaxes(0, 1), "jpeg"), exif(8)),
    "cut jpeg": encode(IMAGE, "jpeg")[:500],
    "too large": encode(IMAGE.repeat(2, 0), "png"),
    "gif": encode(IMAGE, "gif"),
}


def good() -> dict[str, bytes]:
    return {"good.png": encode(IMAGE, "png"), "good.label.png": grey(1)}


def write_tar(folder: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def force_into_index(folder: Path, files: dict[str, bytes]) -> str:
    """An index of a tar of two good pairs, of which the second is then another; checksums fit, facts do not."""
    size = max(map(len, files.values())) + 4096
    padded = {name.replace("good", "x"): data + bytes(size - len(data)) for name, data in good().items()}
    write_tar(folder, good() | padded)
    assert build_index(folder, progress=lambda line: None).index
    samples = np.load(folder / "index/samples.npy", mmap_mode="r+")
    with (folder / "a.tar").open("r+b") as tar:
        for field, data in zip(("image", "label"), files.values(), strict=True):
            tar.seek(int(samples[f"{field}_offset"][1]))
            tar.write(data)
            samples[f"{field}_size"][1] = len(data)
            samples[f"{field}_checksum"][1] = zlib.crc32(data)
    samples.flush()
    seal(folder / "index")
    return str(folder)


def trains(location: str) -> str:
    stream = TrainingStream(
        config({"source": location}, crop_size=[8, 8], rare_class_sampling=False), seed=0, layout=layout()
    )
    try:
        stream.domains["source"].batch(range(4))
    except ValueError as error:
        return str(error)
    return ""


def scores(location: str) -> str:
    try:
        list(read_validation(config({"source": location, "validation": location})))
    except ValueError as error:
        return str(error)
    return ""


def broken(location: str) -> str:
    """Return what verifying says of the sample itself; the changed index does not matter here."""
    found = [problem for problem in verify_shards(location, progress=lambda line: None).problems if problem.key == "x"]
    return "".join(p.what for p in found if "class pixels" not in p.what and "members of this key" not in p.what)


CASES = [("png", label) for label in LABELS] + [(image, "train ids") for image in IMAGES if image != "png"]


@pytest.mark.parametrize(("image", "label"), CASES, ids=lambda value: value)
def test_all_say_the_same_of_a_sample(tmp_path: Path, image: str, label: str) -> None:
    files = {"x.png": IMAGES[image], "x.label.png": LABELS[label]}
    (tmp_path / "a").mkdir()
    write_tar(tmp_path / "a", good() | files)
    indexed = "".join(p.what for p in build_index(tmp_path / "a", progress=lambda line: None).problems)
    (tmp_path / "b").mkdir()
    location = force_into_index(tmp_path / "b", files)
    said = {"indexed": indexed, "verified": broken(location), "trained": trains(location), "scored": scores(location)}
    if image == "too large":  # of which only the index knows the size
        assert said["verified"] and said["trained"] and said["scored"], said
        return
    assert len({bool(what) for what in said.values()}) == 1, said
    refused = label in ("19", "254", "256 of 16 bits", "65535 of 16 bits", "too small", "JPEG", "colours", "text")
    assert bool(indexed) == (refused or label == "turned the wrong way" or image in ("cut jpeg", "gif")), said


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_no_train_id_is_named(dtype: type) -> None:
    with pytest.raises(ValueError, match=r"the label holds 19, 254; labels must hold train ids, 0-18 or 255"):
        decode_train_ids(png(np.array([[0, 254, 255, 19, 18]], dtype)), (1, 5), num_classes=19)
    ids = np.array([[0, 255, 18]], dtype)
    read = decode_train_ids(png(ids), (1, 3), num_classes=19)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, ids)
    assert count_classes(read, num_classes=19).tolist() == [1, *[0] * 17, 1]


def test_ids_beyond_a_byte_are_not_cut_to_one() -> None:
    with pytest.raises(ValueError, match=r"the label holds 256, 274, 511, 512, 65280, \.\.\.;"):
        decode_train_ids(png(np.array([[256, 274, 511, 512, 65280, 65535]], np.uint16)), (1, 6), num_classes=19)


def test_a_label_of_another_size_is_named() -> None:
    with pytest.raises(ValueError, match="the label has 2x3 pixels, its image 24x32"):
        examine(IMAGES["png"], png(np.zeros((2, 3), np.uint8)), num_classes=19)
