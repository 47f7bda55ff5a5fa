"""`predict_files`: what it writes, reads and refuses."""

import os
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iccld.data.images.decode import decode_image
from iccld.inference.files import predict_files, read_image
from iccld.inference.prediction import segment
from iccld.labels import CITYSCAPES_19, CITYSCAPES_PALETTE, merged_class_set

PIXELS = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
EXIF_ORIENTATION = 0x0112


def dominant_channel(images, numbers):
    """Class 0, 1 or 2 by the strongest colour channel."""
    assert images.shape[0] == len(numbers) == 1 and numbers.dtype == torch.int64
    return torch.nn.functional.pad(images, (0, 0, 0, 0, 0, 16))


def predict_folder(path, output, predict=dominant_channel, class_set=CITYSCAPES_19, **options):
    one = partial(segment, predictors=[predict], names=class_set.names, colours=class_set.palette)
    return predict_files([path], output, one, **options)


def test_writes_indices_with_the_palette_and_an_overlay(tmp_path):
    image = np.zeros((5, 7, 3), np.uint8)
    image[:, :4, 1] = 200
    image[:, 4:, 2] = 100
    Image.fromarray(image).save(tmp_path / "frame.png")
    written = predict_folder(tmp_path / "frame.png", tmp_path / "out")
    assert written == [tmp_path / "out/frame_label.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "frame_label.png", "frame_overlay.png", "legend.png"
    ]  # fmt: skip
    with Image.open(written[0]) as label:
        assert (np.array(label) == np.repeat([1, 2], [4, 3])).all()
        assert label.mode == "P" and label.getpalette()[: 3 * 19] == [v for c in CITYSCAPES_PALETTE for v in c]
    mean = np.array(Image.open(tmp_path / "out/frame_overlay.png")).astype(int)
    assert np.abs(2 * mean - image - np.where(np.arange(7)[None, :, None] < 4, *CITYSCAPES_PALETTE[1:3])).max() <= 1


def test_label_pngs_have_8_bits_whatever_the_number_of_classes(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "frame.png")
    class_set = merged_class_set(["road", "car", "sky"], {0: 0, 13: 1, 10: 2})
    written = predict_folder(tmp_path / "frame.png", tmp_path / "out", class_set=class_set)
    assert written[0].read_bytes()[24] == 8  # the bit depth in the PNG's header


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "jpg", "PNG"])
def test_common_formats_are_read(tmp_path, suffix):
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(suffix, {})
    flat = np.full((8, 8, 3), (10, 20, 200), np.uint8)
    Image.fromarray(flat).save(tmp_path / f"frame.{suffix}", **lossless)
    assert np.abs(read_image(tmp_path / f"frame.{suffix}").astype(int) - flat).max() <= 2
    assert len(predict_folder(tmp_path, tmp_path / "out")) == 1


def test_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # stored a quarter turn anti-clockwise
    Image.fromarray(PIXELS).save(tmp_path / "frame.png", exif=exif)
    assert (read_image(tmp_path / "frame.png") == np.rot90(PIXELS, -1)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_grey_alpha_and_palettes_become_rgb(tmp_path, mode):
    picture = Image.fromarray(PIXELS).convert(mode)
    picture.save(tmp_path / "frame.tif")
    assert (read_image(tmp_path / "frame.tif") == np.array(picture.convert("RGB"))).all()


def test_transparent_pixels_keep_their_colour(tmp_path):
    Image.fromarray(np.dstack([PIXELS, np.zeros((6, 8), np.uint8)])).save(tmp_path / "frame.png")
    assert (read_image(tmp_path / "frame.png") == PIXELS).all()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "frame.png")
    assert read_image(tmp_path / "frame.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match=r"depth.tif: pixels of 32 bits have no known range; save it"):
        read_image(tmp_path / "depth.tif")


def test_tiffs_are_scaled_by_the_depth_that_they_say(tmp_path):
    grey = np.array([[0, 1023, 2047, 4095]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(data)
    assert read_image(tmp_path / "b.tif")[0, :, 0].tolist() == [0, 4, 8, 16]
    packed = bytes.fromhex("0003ff7fffff")  # 12 bits each
    entry, twelve = struct.pack("<HHIHH", 258, 3, 1, 16, 0), struct.pack("<HHIHH", 258, 3, 1, 12, 0)
    count, short = struct.pack("<HHII", 279, 4, 1, 8), struct.pack("<HHII", 279, 4, 1, 6)
    assert entry in data and count in data
    pixels = grey.astype("<u2").tobytes()
    data = data.replace(entry, twelve).replace(count, short).replace(pixels, packed + bytes(2))
    (tmp_path / "b.tif").write_bytes(data)
    assert read_image(tmp_path / "b.tif")[0, :, 0].tolist() == [0, 64, 127, 255]


def test_images_of_12_bits_in_16_are_said_to_be_dark_once(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    grey = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    for name, pixels in {"a.png": grey, "b.tif": grey, "c.png": 16 * grey, "d.tif": 16 * grey}.items():
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "in" / "e.png")
    for source, output, said in (("in", "out", "2"), ("in/b.tif", "b.png", "1"), ("in/c.png", "c.png", "")):
        predict_folder(tmp_path / source, tmp_path / output)
        noted = [line[:60] for line in capsys.readouterr().err.splitlines() if "predict: " in line]
        assert noted == [f"predict: {said} images of 16 bits are almost black: no value is above"[:60]] * bool(said)


def test_subfolders_are_mirrored_and_a_second_run_leaves_its_own_pictures_out(tmp_path):
    for name in ("b.png", "city/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PIXELS).save(tmp_path / name)
    output = tmp_path / "out"
    expected = [output / "b_label.png", output / "city/a_label.png"]
    assert predict_folder(tmp_path, output) == expected
    assert predict_folder(tmp_path, output) == expected


def test_images_of_one_stem_do_not_overwrite_each_other(tmp_path):
    names = ["a.png", "a.bmp", "a.bmp.png", "b.png"]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), tuple(255 * (c == i % 3) for c in range(3))).save(tmp_path / name)
    written = predict_folder(tmp_path, tmp_path / "out")
    found = {path.name: int(np.array(Image.open(path)).max()) for path in written}
    assert found == {"a.png_label.png": 0, "a.bmp_label.png": 1, "a.bmp.png_label.png": 2, "b_label.png": 0}


def test_the_noise_key_is_the_same_alone_and_among_others(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    numbers = []

    def predict(images, number):
        numbers.append(number.item())
        return dominant_channel(images, number)

    predict_folder(tmp_path, tmp_path / "out", predict)
    predict_folder(tmp_path / "b.png", tmp_path / "alone", predict)
    assert len(set(numbers[:3])) == 3
    assert numbers[3] == numbers[1]


def test_unreadable_images_are_passed_over_and_listed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:6000])
    with pytest.raises(ValueError, match=r"2 of 3 files were not segmented \(the other 1 are in") as caught:
        predict_folder(tmp_path, tmp_path / "out")
    assert "text.png" in str(caught.value) and "torn.png" in str(caught.value)
    assert (tmp_path / "out/good_label.png").exists()


def refused(path, output, predict=dominant_channel):
    """The lines on what was not segmented, by the file's name."""
    with pytest.raises(ValueError) as caught:
        predict_folder(path, output, predict)
    first, *lines = str(caught.value).split("\n  ")
    assert first.startswith(f"predict: {len(lines)} of ")
    return {line.partition(": ")[0].removeprefix(f"{path}/"): line.partition(": ")[2] for line in lines}


def odd_exif(*entries):
    """EXIF of an image that lies on its side, with one more tag that is of no type that anyone expects."""
    entries = ((0x112, 3, 1, b"\0\6\0\0"), *entries)
    body = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + bytes(4)


ODD_TAGS = {
    "resolution as text": (0x11A, 2, 4, b"72\0\0"),
    "model as double": (0x110, 12, 1, b"\0\0\0\1"),
    "undefined": (0x2BC, 7, 4, b"\xff\xfe\0\0"),
    "directory as text": (0xA005, 2, 3, b"ab\0\0"),
}


@pytest.mark.parametrize("tag", ODD_TAGS.values(), ids=ODD_TAGS)
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_odd_exif_tags_do_no_harm_and_the_image_is_upright(tmp_path, tag, suffix):
    picture = Image.fromarray(PIXELS)
    picture.save(tmp_path / f"b.{suffix}", exif=odd_exif(tag), **({"lossless": True} if suffix == "webp" else {}))
    assert read_image(tmp_path / f"b.{suffix}").shape == (8, 6, 3)
    assert len(predict_folder(tmp_path, tmp_path / "out")) == 1


def test_one_bad_file_is_one_line_and_the_others_are_segmented(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "m.png", "z.png"):
        Image.fromarray(PIXELS).save(folder / name)
    (folder / "movie.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "empty.png").touch()
    (folder / ("n" * 245 + ".jpg")).write_bytes((folder / "a.png").read_bytes())
    bomb = (folder / "a.png").read_bytes()
    (folder / "bomb.png").write_bytes(bomb[:16] + struct.pack(">II", 60_000, 60_000) + bomb[24:])
    with (folder / "huge.tif").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe")
    (folder / "nowhere.png").symlink_to("/nonexistent")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "it\nself").symlink_to("it\nself")
    (folder / "folder.png").mkdir()
    found = refused(folder, tmp_path / "out")
    assert {name: what.partition(" (")[0].partition(";")[0] for name, what in found.items()} == {
        "movie.mp4": "it is no image of a known format",
        "broken.jpg": "it is a JPEG whose header is cut off or damaged",
        "empty.png": "it is empty",
        f"{tmp_path}/out/{'n' * 245}_overlay.png": "it cannot be written",
        "bomb.png": "it has 60000x60000 pixels",
        "huge.tif": "it has 1099511627776 bytes",
        "pipe.png": "it is no plain file",
        "pipe": "it is no plain file",
        "nowhere.png": "it is a link that leads nowhere",
        "itself.png": "it is a link that leads nowhere",
        repr(f"{folder}/it\nself"): "Too many levels of symbolic links",
    }
    assert sorted(path.name for path in (tmp_path / "out").glob("*_label.png")) == [f"{i}_label.png" for i in "amz"]


@pytest.mark.parametrize("suffix", ["gif", "ppm", "pgm", "jfif", "jpe", "JPG", "tif", "dib", "apng", ""])
def test_images_are_known_by_their_content(tmp_path, suffix):
    format_name = {"gif": "GIF", "ppm": "PPM", "pgm": "PPM", "tif": "TIFF", "dib": "BMP", "apng": "PNG"}.get(
        suffix, "JPEG"
    )
    Image.fromarray(PIXELS).save(tmp_path / f"frame.{suffix}".removesuffix("."), format=format_name)
    assert predict_folder(tmp_path, tmp_path / "out") == [tmp_path / "out/frame_label.png"]


def test_what_is_read_is_what_training_reads(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    for mode, suffix in (("RGB", "jpg"), ("CMYK", "jpg"), ("L", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png")):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6
        picture.convert(mode).save(tmp_path / f"frame.{suffix}", exif=exif)
        data = (tmp_path / f"frame.{suffix}").read_bytes()
        assert (read_image(tmp_path / f"frame.{suffix}") == decode_image(data)).all()


def test_names_that_are_no_utf8(tmp_path):
    names = [os.fsdecode(name) for name in (b"M\xfcnster.png", b"a\nb.png", b"\xff.jpg")]
    for name in names[:2]:
        Image.fromarray(PIXELS).save(tmp_path / name)
    (tmp_path / names[2]).write_text("no image")
    with pytest.raises(ValueError, match=r"1 of 3 .*:\n  '.*/.udcff.jpg': it is no image of a known format"):
        predict_folder(tmp_path, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*_label.png"))) == 2


def test_names_depend_on_images_alone(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("{}")
    assert refused(tmp_path, tmp_path / "out") == {"a.json": "it is no image of a known format"}
    assert (tmp_path / "out/a_label.png").exists()


def test_linked_folders_are_read_once(tmp_path, capsys):
    for name in ("disk/day2/b.png", "frames/day1/a.png", "frames/.hidden/c.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(PIXELS).save(tmp_path / name)
    frames = tmp_path / "frames"
    (frames / "day2").symlink_to("../disk/day2")
    (frames / "again").symlink_to("day1")
    (frames / "day1/up").symlink_to("..")
    (tmp_path / "disk/day2/back").symlink_to(frames)
    (tmp_path / "disk/day2/own").symlink_to("/nonexistent")
    output = frames / "out"
    for _ in range(2):  # the second time, there is an earlier run's output
        assert refused(frames, output) == {"day2/own": "No such file or directory"}
        assert sorted(output.rglob("*_label.png")) == [output / "day1/a_label.png", output / "day2/b_label.png"]
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("predict: ")]
        assert sum("links to a folder that is segmented already" in line for line in lines) == 3
        assert lines[-1] == "predict: 1 hidden files and folders were passed over"


def test_each_of_several_folders_has_its_name_in_the_output(tmp_path, monkeypatch):
    for name in ("day/frames/a.png", "day/frames/here/b.png", "other/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(tmp_path / name)
    monkeypatch.chdir(tmp_path / "day/frames/here")
    one = partial(segment, predictors=[dominant_channel], names=CITYSCAPES_19.names, colours=CITYSCAPES_PALETTE)
    written = predict_files([Path(".."), Path(), Path("../../../other")], tmp_path / "out", one)
    names = ["frames/a", "frames/here/b", "here/b", "other/c"]
    assert sorted(written) == [tmp_path / f"out/{name}_label.png" for name in names]
    assert sorted((tmp_path / "out").rglob("*_label.png")) == sorted(written)


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    deep = tmp_path / "/".join(["d" * 200] * 18)
    code = "import os, sys; os.chdir(sys.argv[1]); [(os.mkdir('d' * 200), os.chdir('d' * 200)) for _ in range(22)]"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert deep.exists()
    found = refused(tmp_path, tmp_path / "out")
    assert list(found.values()) == ["the folder cannot be read (File name too long)"]
    assert (tmp_path / "out/a_label.png").exists()


@pytest.mark.parametrize("said", ["", "CUDNN_STATUS_ALLOC_FAILED", "std::bad_alloc"])
def test_an_image_that_memory_does_not_suffice_for_does_not_stop_the_others(tmp_path, said: str):
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        Image.fromarray(np.repeat(PIXELS, 1 + i % 2, 0)).save(tmp_path / name)

    def predict(images, numbers):
        if images.shape[2] > 6:
            if said:
                raise RuntimeError(said)
            torch.empty(1 << 50)
        return dominant_channel(images, numbers)

    assert refused(tmp_path, tmp_path / "out", predict) == {
        "b.png": "memory does not suffice for its 12x8 pixels; use --size or --sliding-window"
    }
    with pytest.raises(RuntimeError, match="of the program"):
        predict_folder(tmp_path, tmp_path / "out", lambda *_: (_ for _ in ()).throw(RuntimeError("of the program")))


FULL = """
import resource, sys
from pathlib import Path
from iccld.outcome import words
from tests.inference.test_files import predict_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
try:
    predict_folder(Path(sys.argv[1]), Path(sys.argv[2]))
except OSError as error:
    print(error.errno, words(error), sep="\\n")
"""


def test_a_disk_that_takes_no_more_ends_it_with_file_and_remedy(tmp_path):
    """The system's limit on a file's size is told as a full disk is: half-way through a file."""
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "in" / name)
    command = [sys.executable, "-c", FULL, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    number, message = done.stdout.splitlines()
    assert number == "27"
    assert f"0 of 2 images are in {tmp_path}/out: '{tmp_path}/out/a_overlay.png'; raise the limit" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_write_leaves_no_partial_picture(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "frame.png")

    def torn_save(self, file, **kwargs):
        file.write(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", torn_save)
    with pytest.raises(OSError, match="disk full"):
        predict_folder(tmp_path / "frame.png", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist; give images, folders"):
        predict_folder(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no image \(\.bmp, .*\); give another folder"):
        predict_folder(tmp_path, tmp_path / "out")
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"is the input folder; give another one"):
        predict_folder(tmp_path, tmp_path / "sub" / "..")
    with pytest.raises(ValueError, match=r"a.png is one picture, and takes one image"):
        predict_folder(tmp_path, tmp_path / "a.png")


def test_an_input_is_never_overwritten(tmp_path):
    inputs = tmp_path / "in"
    (inputs / "in").mkdir(parents=True)
    Image.fromarray(PIXELS).save(inputs / "a_label.png")
    Image.fromarray(PIXELS).save(inputs / "in/a.png")
    before = (inputs / "a_label.png").read_bytes()
    with pytest.raises(ValueError, match=r"a_label.png is an input and would be overwritten"):
        predict_folder(inputs, tmp_path)
    assert (inputs / "a_label.png").read_bytes() == before
