"""A user's own table, and input trees: layers, processes, and zips that are broken or hostile."""

import json
import multiprocessing
import os
import struct
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from iccld.data.shards.converters import Converter, InputTree, UnknownIds, open_converter, tree
from iccld.data.shards.converters.tree import NotSeen
from tests.data.factory import write_gta5
from tests.data.shards.test_data_sets import encoded, write_folder, write_zip

OWN = """
# ACDC's night images only
images: rgb_anon/night/{split}/{sequence}/{frame}_rgb_anon.png
labels: gt/night/{split}/{sequence}/{frame}_gt_labelTrainIds.png
splits: [train, val]
labels_as: ids
ids: cityscapes_train_ids
"""


def test_a_set_of_ones_own_is_one_yaml(tmp_path: Path) -> None:
    (tmp_path / "acdc_night.yaml").write_text(OWN)
    label = np.arange(20, dtype=np.uint8).reshape(4, 5)
    label[label == 19] = 255
    files = {
        "rgb_anon/night/val/S1/a_rgb_anon.png": b"",
        "rgb_anon/fog/val/S1/b_rgb_anon.png": b"",
        "gt/night/val/S1/a_gt_labelTrainIds.png": encoded(label),
    }
    converter = open_converter(str(tmp_path / "acdc_night.yaml"), write_folder(tmp_path / "in", files), split="val")
    (pair,) = converter.pairs()
    assert (converter.name, pair.key, pair.image) == ("acdc_night", "S1/a", "rgb_anon/night/val/S1/a_rgb_anon.png")
    np.testing.assert_array_equal(converter.train_ids(pair.label or ""), label)


def test_a_target_set_of_ones_own_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("images: 'drive_{n}/{frame}.{suffix}'")
    files = {
        "drive_1/x.JPG": b"",
        "drive_1/x.txt": b"",
        "drive_1/z.bmp": b"",
        "drive_1/z.tiff": b"",
        "drive_2/.y.jpg": b"",
        "other/z.png": b"",
        "drive_2/y.png": b"",
    }
    converter = open_converter(str(tmp_path / "mine.yml"), write_folder(tmp_path / "in", files))
    assert [(pair.key, pair.label) for pair in converter.pairs()] == [("1/x", None), ("2/y", None)]
    assert converter.survey().spare_labels == []
    described = converter.describe()
    assert json.loads(json.dumps(described)) == described and described["images"] == "drive_{n}/{frame}.{suffix}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("images: [a", ":1: expected ',' or ']'"),
        ("- images", "there is no mapping; write one `key: value` a line"),
        ("image: x", "image is no key of a data set; there are class_list, ids, images, key"),
        ("labels: x", "images is missing; write a pattern, as in images: images/{frame}.png"),
        ("images: ../{a}.png", "images=../{a}.png is no pattern; it must be a relative path"),
        ("images: 'x/{a.png'", "is no pattern; .* braces enclose one name"),
        ("{images: '{a}.png', labels: '{b}.png'}", "labels={b}.png: b is no placeholder of images; name it there"),
        ("{images: '{a}.png', key: '{b}'}", "key={b}: b is no placeholder of images"),
        ("{images: '{a}.png', labels: 3}", "labels=3 must be a text or a list of texts"),
        ("{images: '{a}.png', splits: [x]}", "images names {split} where, and only where, splits lists them"),
        ("{images: '{split}/{a}.png'}", "images names {split} where, and only where"),
        ("{images: '{a}.png', ids: {1: 1}}", "ids without labels; add a pattern of labels, or leave it out"),
        (
            "{images: '{a}.png', labels: '{a}.p', labels_as: rgb}",
            "labels_as=rgb is unknown; use one of ids, red16, col",
        ),
        ("{images: '{a}.png', labels: '{a}.p', labels_as: polygons}", "ids is missing; write {old id: train id}"),
        ("{images: '{a}.png', labels: ['{a}.p', '{a}.q']}", "2 labels and 0 class_list; list one for each"),
        (
            "{images: '{a}.png', labels: '{a}.p', labels_as: colors, class_list: x}",
            "goes with labels_as: ids, not colors",
        ),
        ("{images: '{a}.png', labels: '{a}.p', labels_as: red16}", "ids is missing; write {old id: train id}"),
        ("{images: '{a}.png', labels: '{a}.p', ids: citiscapes}", "ids: 'citiscapes' is no known map of such labels"),
        (
            "{images: '{a}.png', labels: '{a}.p', ids: {1: road}}",
            r"ids: \['road'\] on the right-hand side; write .* --classes FILE",
        ),
        (
            "{images: '{a}.png', labels: '{a}.p', labels_as: colors, ids: {0 0 256: 0}}",
            r"ids: '0 0 256' on the left-hand side \(a colour is three numbers from 0 to 255\)",
        ),
    ],
)
def test_a_bad_table_is_told_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"--dataset .*mine.yaml:? ?.*{message}") as error:
        open_converter(str(path), tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"gone.yaml: there is no such file; give the path of a text file"):
        open_converter(str(tmp_path / "gone.yaml"), tmp_path)


def test_layers_are_overlaid_and_files_located(tmp_path: Path) -> None:
    write_zip(tmp_path / "02_images.zip", {"images/b.png": b"2", "images/c.png": b"2"})
    write_zip(tmp_path / "01_images.ZIP", {"images/a.png": b"1", "images/b.png": b"1"})
    write_folder(tmp_path, {"images/a.png": b"0", ".hidden/images/x.png": b""})
    found = InputTree(tmp_path, tops=["images"])
    assert [(path, found.read(path)) for path in found.files("images")] == [
        ("images/a.png", b"0"), ("images/b.png", b"1"), ("images/c.png", b"2"),
    ]  # fmt: skip
    assert found.location("images/a.png") == str(tmp_path / "images/a.png")
    assert found.location("images/c.png") == f"{tmp_path / '02_images.zip'}: images/c.png"
    assert found.files("labels") == [] and not found.exists("images") and not found.exists("images/../images/a.png")


def test_two_sets_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    write_folder(tmp_path, {"gta5/images/a.png": b"", "camvid/images/b.png": b""})
    with pytest.raises(ValueError, match="holds no images of gta5"):
        open_converter("gta5", tmp_path).pairs()


def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "far", {"a.png": b""})
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "images" / "loop").symlink_to(tmp_path / "in")
    assert InputTree(tmp_path / "in").files("images") == ["images/linked/a.png"]


def test_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    write_folder(tmp_path, {"images/day/a.png": b"", "images/night/b.png": b"", "far/c.png": b""})
    links = {"images/day/after": "../night", "images/night/before": "../day", "images/far": "../far", "far/back": ".."}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    not_seen, there = NotSeen(), ["day/a.png", "day/after/b.png", "far/c.png", "night/b.png", "night/before/a.png"]
    assert InputTree(tmp_path).files("images", not_seen=not_seen) == [f"images/{name}" for name in there]
    assert list(not_seen.passed_over.kinds) == ["links to folders passed over: they lead back"]


_held: list[Converter] = []


def _hold(converter: Converter) -> None:
    _held[:] = [converter]


def _train_ids(label: str) -> np.ndarray:
    return _held[0].train_ids(label)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_zips_are_read_by_several_processes(tmp_path: Path, method: str) -> None:
    root = write_gta5(tmp_path / "gta5", 12)
    packed = write_zip(
        tmp_path / "a.zip", {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.png")}
    )
    converter = open_converter("gta5", packed)
    labels = [pair.label or "" for pair in converter.pairs()] * 50
    converter.train_ids(labels[0])  # the zip is open before the others start; forked ones inherit it
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context, initializer=_hold, initargs=(converter,)) as pool:
        for label, train_ids in zip(labels, pool.map(_train_ids, labels), strict=True):
            np.testing.assert_array_equal(train_ids, converter.train_ids(label))


def test_names_that_lead_out_are_not_seen(tmp_path: Path) -> None:
    names = ["../images/a.png", "/images/b.png", "images/../../c.png", "..\\images\\d.png", "__MACOSX/images/._e.png"]
    packed = write_zip(tmp_path / "in" / "a.zip", dict.fromkeys([*names, "images/.f.png", "//images/g.png"], b"x"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"outside")
    for root in (packed, packed.parent):
        found = InputTree(root, tops=["images"])
        assert found.files("images") == []
        for name in ("../images/a.png", str(tmp_path / "images" / "a.png")):
            with pytest.raises(FileNotFoundError):
                found.read(name)
    assert list((tmp_path / "in").iterdir()) == [packed]


def test_names_of_a_zip_are_the_same_however_they_are_spelt(tmp_path: Path) -> None:
    names = ["./", "./images/a.png", "images//b.png", "images/./c.png", ".//images/.//d.png", "images\\\\e.png"]
    found = InputTree(write_zip(tmp_path / "a.zip", dict.fromkeys(names, b"x")), tops=["images"])
    not_seen = NotSeen()
    assert [*found.files("images", not_seen=not_seen)] == [f"images/{letter}.png" for letter in "abcde"]
    assert not not_seen.passed_over.kinds
    assert found.read("images/d.png") == b"x"


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = write_zip(tmp_path / "a.zip", {"images/a.png": bytes(50_000)})
    monkeypatch.setattr(tree, "MAX_FILE_BYTES", 2**14)
    with pytest.raises(ValueError, match=r"holds more than 0.015625 MiB; no image or label is that large"):
        InputTree(packed).read("images/a.png")
    data = packed.read_bytes()
    assert data.count(struct.pack("<I", 50_000)) == 2
    packed.write_bytes(data.replace(struct.pack("<I", 50_000), struct.pack("<I", 9)))  # both headers lie
    with pytest.raises(ValueError, match=r"cannot be unpacked .*CRC"):
        InputTree(packed).read("images/a.png")
    write_folder(tmp_path / "in", {"a.png": bytes(50_000)})
    with pytest.raises(ValueError, match="holds more than"):
        InputTree(tmp_path / "in").read("a.png")


def test_broken_zips_are_named(tmp_path: Path) -> None:
    packed = write_zip(tmp_path / "in" / "a.zip", {"images/a.png": os.urandom(500)})
    data = packed.read_bytes()
    packed.write_bytes(data[:200] + b"\xff\xff\xff" + data[203:])
    with pytest.raises(ValueError, match="it cannot be unpacked"):
        InputTree(packed).read("images/a.png")
    packed.write_bytes(data.replace(b"\x14\x00\x00\x00\x08\x00", b"\x14\x00\x01\x00\x08\x00"))
    with pytest.raises(ValueError, match=r"it cannot be unpacked .*password"):
        InputTree(packed).read("images/a.png")
    packed.write_bytes(data[:300])
    for root in (packed, packed.parent):
        with pytest.raises(
            ValueError, match=r"--input: .*a.zip cannot be read as a zip .*; fetch it again, or move it"
        ):
            InputTree(root)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("images/a.png", b"x")
    with pytest.raises(ValueError, match="packed by method 14, which cannot be read; unpack the zip first"):
        InputTree(packed).read("images/a.png")
    with pytest.raises(ValueError, match="there is no such folder or zip"):
        open_converter("gta5", tmp_path / "gone")


def test_an_unknown_id_in_a_zip_is_told(tmp_path: Path) -> None:
    packed = write_zip(
        tmp_path / "a.zip", {"labels/1.png": encoded(np.full((2, 2), 77, np.uint8)), "labels/2.png": b""}
    )
    converter = open_converter("gta5", packed)
    with pytest.raises(UnknownIds, match=r"does not define: \[77\]"):
        converter.train_ids("labels/1.png")
    with pytest.raises(ValueError, match="it is empty"):
        converter.train_ids("labels/2.png")
