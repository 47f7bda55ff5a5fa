"""Rules for any data set: tables, mappings, label ids, splits, and input that is broken or hostile."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from iccld.data.shards.converters import UnknownIds, open_converter
from iccld.data.shards.converters.readers import map_ids, read_red16
from iccld.labels import CITYSCAPES_ID_TO_TRAIN_ID
from tests.data.factory import random_pair, save, write_cityscapes, write_folder
from tests.data.shards.test_data_sets import CAMVID_LACKS, encoded, png16, write_zip
from tests.data.shards.test_data_sets import write_folder as write_files

GREY = encoded(np.zeros((2, 2), np.uint8))


def rectangle(label: str, x0: int, y0: int, x1: int, y1: int, **more: Any) -> dict[str, Any]:
    return {"label": label, "polygon": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]], **more}


IDD_OBJECTS = [
    rectangle("sky", 0, 0, 9, 3),
    rectangle("road", 0, 3, 9, 7, deleted=0),
    rectangle("cargroup", 1, 2, 3, 4),
    rectangle("bus", 0, 0, 9, 7, deleted=1),
    rectangle("ground", 0, 0, 9, 7),
    rectangle("license plate", 2, 4, 2, 4),
    {"label": "person", "polygon": [[0, 0], [1, 1]]},
]


@pytest.mark.parametrize("write", [write_files, lambda root, files: write_zip(root / "idd.zip", files)])
def test_idd_polygons_are_drawn_in_order(tmp_path: Path, write) -> None:
    image = "leftImg8bit/train/{0}_leftImg8bit.{1}"
    files = {image.format("0/005506", "png"): b"", image.format("201/frame0029", "jpg"): b""}
    label = json.dumps({"imgWidth": 10, "imgHeight": 9, "objects": IDD_OBJECTS}).encode()
    files |= {"gtFine/train/0/005506_gtFine_polygons.json": label}
    converter = open_converter("idd", write(tmp_path / "in", files), split="train")
    assert [pair.key for pair in converter.pairs()] == ["0/005506", "201/frame0029"]
    expected = np.full((9, 10), 255)
    for train_id, rows, columns in ((10, (0, 4), (0, 10)), (0, (3, 8), (0, 10)), (13, (2, 5), (1, 4))):
        expected[slice(*rows), slice(*columns)] = train_id
    expected[4, 2] = 255
    np.testing.assert_array_equal(converter.train_ids(converter.pairs()[0].label or ""), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"imgWidth": 4, "imgHeight": 4, "objects": [rectangle("cow", 0, 0, 1, 1)]}, r"does not define: \['cow'\]"),
        (
            {"imgWidth": 10**6, "imgHeight": 10**6, "objects": []},
            "1000000x1000000, or one of its coordinates is absurd",
        ),
        ({"imgWidth": 4, "imgHeight": 4, "objects": [rectangle("car", 0, 0, 10**9, 1)]}, "coordinates is absurd"),
        ({"imgWidth": 4, "imgHeight": 4}, "no file of polygons .*objects"),
        ({"imgWidth": 4, "imgHeight": 4, "objects": [{"label": "car", "polygon": ["ab"]}]}, "no file of polygons"),
        ([], "no file of polygons"),
    ],
)
def test_bad_polygons_are_named(tmp_path: Path, content: Any, message: str) -> None:
    write_files(tmp_path, {"gtFine/x.json": json.dumps(content).encode()})
    with pytest.raises(ValueError, match=message):
        open_converter("idd", tmp_path, split="val").train_ids("gtFine/x.json")


@pytest.mark.parametrize(("dataset", "split", "num_ids"), [("gta5", "", 35), ("cityscapes", "train", 34)])
def test_defined_ids_that_are_not_evaluated_are_ignored_and_others_are_errors(
    tmp_path: Path, dataset: str, split: str, num_ids: int
) -> None:
    ids = open_converter(dataset, tmp_path, split=split).ids
    assert map_ids(np.arange(num_ids)[None], ids)[0].tolist() == [
        CITYSCAPES_ID_TO_TRAIN_ID.get(i, 255) for i in range(num_ids)
    ]
    with pytest.raises(UnknownIds, match=rf"does not define: \[{num_ids}, 200\]"):
        map_ids(np.array([[7, 200, num_ids]]), ids)


def test_ids_may_have_16_bits_and_unknown_ones_are_counted() -> None:
    assert map_ids(np.array([[65535]], np.uint16), {65535: 4}).tolist() == [[4]]
    with pytest.raises(UnknownIds, match=r"define: \[-1, 0, 1, 2, 3, 5, 6, 7\] and 3 more"):
        map_ids(np.array([[-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2**31 - 1]], np.int32), {4: 4})
    with pytest.raises(UnknownIds, match=r"define: \[-1\]"):  # which is no place from the end
        map_ids(np.array([[-1]], np.int32), {4: 4})


@pytest.mark.parametrize(
    ("dataset", "lacks", "several"),
    [
        ("synthia", [], {255: 4}),
        ("mapillary_v1.2", [], {0: 3, 1: 2, 5: 2, 12: 3, 255: 41}),
        ("mapillary_v2.0", [], {0: 24, 1: 2, 2: 2, 5: 2, 6: 6, 7: 4, 11: 2, 12: 3, 255: 68}),
        ("idd", [], {255: 21}),
        ("camvid", CAMVID_LACKS, {0: 3, 2: 2, 8: 2, 11: 2, 13: 2, 255: 11}),
    ],
)
def test_how_many_names_fall_into_each_class(tmp_path: Path, dataset: str, lacks: list[int], several: Any) -> None:
    split = {"idd": "train"}.get(dataset, "training" if dataset.startswith("mapillary") else "")
    counts = Counter(id for id in open_converter(dataset, tmp_path, split=split).ids.values() if id is not None)
    assert counts == {i: 1 for i in range(19) if i not in lacks} | several


def test_sixteen_bits_of_red_are_read_and_only_they() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    ids = {int(value): i % 19 for i, value in enumerate(np.unique(pixels[..., 0]))}
    np.testing.assert_array_equal(read_red16(png16(pixels), ids), map_ids(pixels[..., 0], ids))
    with pytest.raises(UnknownIds, match=r"define: \[259\]"):  # 3 in the low byte
        read_red16(png16(np.full((1, 1, 3), 259, np.uint16)), {3: 0})
    bomb = png16(pixels)[:16] + (100_000).to_bytes(4) * 2 + png16(pixels)[24:]
    bad = {
        GREY: "1 channels of 8 bits; labels must be colour PNGs of 16 bits",
        b"GIF": "no image of a known",
        bomb: "100000x100000",
    }
    for data, message in bad.items():
        with pytest.raises(ValueError, match=message):
            read_red16(data, {0: 0})


def test_labels_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"labels/c.png": encoded(np.full((2, 2, 3), (9, 9, 8), np.uint8))})
    with pytest.raises(ValueError, match=r"several channels, which differ; .* one id a pixel"):
        open_converter("folder", tmp_path).train_ids("labels/c.png")
    with pytest.raises(UnknownIds, match=r"define: \['9 9 8'\]"):
        open_converter("camvid", tmp_path).train_ids("labels/c.png")
    with pytest.raises(FileNotFoundError, match="it is missing"):
        open_converter("folder", tmp_path).train_ids("labels/x.png")


def test_mapillary_ids_follow_the_packages_own_list(tmp_path: Path) -> None:
    files = {"training/images/a.jpg": b"", "training/labels/a.png": encoded(np.array([[0, 1, 2]], np.uint8))}
    names = ["nature--sky", "void--unlabeled", "construction--flat--road"]
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=r"config.json is missing; mapillary_v1.2 needs it"):
        open_converter("mapillary_v1.2", tmp_path, split="training").pairs()
    for listed, message in (
        (json.dumps({"labels": [{"name": name} for name in names]}), None),
        (
            json.dumps({"labels": [{"name": "void--ground"}]}),
            r"does not define: \['void--ground'\]; use the data set of",
        ),
        ('{"labels": []}', "does not define: none at all"),
        ("[", r"config.json: it lists no classes \(JSONDecodeError"),
    ):
        (tmp_path / "config.json").write_text(listed)
        converter = open_converter("mapillary_v1.2", tmp_path, split="training")
        if message is None:
            assert converter.train_ids(converter.pairs()[0].label or "").tolist() == [[10, 255, 0]]
        else:
            with pytest.raises(ValueError, match=message):
                converter.pairs()


@pytest.mark.parametrize("name", ["map.json", "map.yaml"])
def test_plain_folder_with_mapping(tmp_path: Path, name: str) -> None:
    save(tmp_path / "images" / "a" / "x.png", np.zeros((2, 2, 3), np.uint8))
    save(tmp_path / "labels" / "a" / "x.png", np.array([[100, 7], [7, 3]], np.uint16))
    mapping = {100: 0, 7: 18, 3: 255}
    (tmp_path / name).write_text(json.dumps(mapping) if name.endswith("json") else yaml.safe_dump(mapping))
    converter = open_converter("folder", tmp_path, mapping=tmp_path / name)
    (pair,) = converter.pairs()
    assert (pair.key, converter.train_ids(pair.label or "").tolist()) == ("a/x", [[0, 18], [18, 255]])
    assert json.loads(json.dumps(converter.describe()))["ids"] == {"3": 255, "7": 18, "100": 0}
    with pytest.raises(ValueError, match="the ids of gta5 are known; leave --mapping out"):
        open_converter("gta5", tmp_path, mapping=tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("{1: 19}", r"\[19\] on the right-hand side; write {old id: train id}"),
        ("{1: null, 2: true, 3: 2.0}", r"\[None, True, 2.0\] on the right-hand side"),
        ("{}", "there is no mapping; write {old id: train id}"),
        ("[1, 2]", "there is no mapping"),
        ("{road: 0}", "'road' on the left-hand side"),
        ("{-1: 0}", r"-1 on the left-hand side \(an id is a number from 0 to 65535\)"),
        ("{1: 0", ":1: expected ',' or '}'"),
        ("{7: 0, 8: 1, 7: 3}", ":1: names '7' twice"),
        ("{7: 0, 0x07: 3}", ":1: names '0x07' twice"),
        ("{7: 0, '07': 3}", "'07' names 7 a second time"),
        ("{1: &a 0, 2: " + "[" * 50 + "]" * 50 + "}", ":1: is nested over 40 deep"),
    ],
)
def test_bad_mapping_files_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "map.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"--mapping .*map.yaml:? ?{message}") as error:
        open_converter("folder", tmp_path, mapping=path)
    assert "\n" not in str(error.value)


def test_plain_folder_with_and_without_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", 3, suffix=".JPG")
    for converter in (open_converter("folder", tmp_path, split="val"), open_converter("folder", tmp_path / "val")):
        assert [pair.key for pair in converter.pairs()] == ["frame_000", "frame_001", "frame_002"]
        np.testing.assert_array_equal(converter.train_ids(converter.pairs()[1].label or ""), random_pair(1)[1])


@pytest.mark.parametrize("images", ["img_{split}/{f}.png", "images/{f}_{split}.png"])
def test_a_split_within_a_name_is_asked_for(tmp_path: Path, images: str) -> None:
    write_files(tmp_path, {images.format(split="val", f="a"): b""})
    (tmp_path / "mine.yaml").write_text(f"images: '{images}'\nsplits: any\n")
    (pair,) = open_converter(str(tmp_path / "mine.yaml"), tmp_path, split="val").pairs()
    assert pair.image == images.format(split="val", f="a")
    with pytest.raises(
        ValueError, match=r"--split is missing: mine has it within a name, as (.*); give --split"
    ) as said:
        open_converter(str(tmp_path / "mine.yaml"), tmp_path)
    assert images in str(said.value)


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("gta5", "val", "--split val: gta5 has no splits; leave --split out"),
        ("cityscapes", "", "--split is missing: cityscapes keeps its splits in folders; use one of train, val, test,"),
        ("cityscapes", "trian", "--split trian is none of cityscapes; use one of train, val"),
        ("folder", "../other", "--split ../other must be the name of a folder"),
        ("gta6", "", "--dataset gta6 is unknown; use one of acdc, .*, or the path of a YAML of your own"),
    ],
)
def test_splits_and_names_are_checked(tmp_path: Path, dataset: str, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_converter(dataset, tmp_path, split=split)


def test_an_input_without_images_is_told_the_layout(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(
        ValueError, match=r"holds no images of gta5, which lie as images/{frame}.png, and labels as labe"
    ):
        open_converter("gta5", tmp_path).pairs()
    write_cityscapes(tmp_path, "train", 1)
    with pytest.raises(
        ValueError, match=r"\(--split val\) holds no images of cityscapes, which lie as leftImg8bit/val/"
    ):
        open_converter("cityscapes", tmp_path, split="val").pairs()


def test_labels_without_image_are_found(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, "train", 3)
    (image,) = (tmp_path / "leftImg8bit" / "train" / "city1").iterdir()
    image.unlink()
    lost = ["gtFine/train/city1/city1_000001_000019_gtFine_labelIds.png"]
    assert open_converter("cityscapes", tmp_path, split="train").survey().spare_labels == lost
