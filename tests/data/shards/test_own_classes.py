"""Shards of classes of one's own: from any kind of labels to a stream, and what does not fit is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iccld.cli import main
from iccld.data.classes import read_classes
from iccld.data.config import DataConfig, DatasetConfig
from iccld.data.images.decode import decode_label
from iccld.data.shards.indexing import build_index
from iccld.data.shards.making import MakeShardsConfig, make_shards
from iccld.data.shards.packing import ImageFormat
from iccld.data.shards.verifying import verify_shards
from iccld.data.storage.index import ShardIndex
from iccld.data.stream.order import RareClassOrder
from iccld.data.stream.validation import read_validation
from tests.data.factory import make_set, members, opened, save, write_cityscapes

YAML = """\
classes:
  floor: {ids: 20, color: [1, 0, 0], cityscapes: road}
  shelf: {ids: [10, 300], color: [2, 0, 0], cityscapes: [car, truck]}
  robot: {ids: 41, color: [3, 0, 0], rare: true}
ignore: [0]
"""
INDICES = np.repeat(np.repeat(np.array([[0, 1], [255, 0]], np.uint8), 8, 0), 8, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my.yaml").write_text(YAML)
    save(tmp_path / "raw/images/a.png", np.full((16, 16, 3), 9, np.uint8))
    return tmp_path


def make(folder: Path, *, progress: Callable[[str], None] = lambda line: None, **settings: Any) -> ShardIndex:
    how: dict[str, Any] = {
        "dataset": "folder",
        "input": str(folder / "raw"),
        "output": str(folder / "set"),
        "classes": f"{folder}/my.yaml",
    }
    return opened(make_shards(MakeShardsConfig(**how | settings), progress=progress))


def stored(index: ShardIndex) -> np.ndarray:
    return decode_label(members(index, 0)[1])


def values(of: dict[int, Any], dtype: Any = np.uint8) -> np.ndarray:
    return np.array([[of[i] for i in row] for row in INDICES.tolist()], dtype)


def test_labels_of_ids_become_indices(folder: Path) -> None:
    save(folder / "raw/labels/a.png", values({0: 20, 1: 10, 255: 0}))
    index = make(folder)
    np.testing.assert_array_equal(stored(index), INDICES)
    assert index.header.class_pixels == [128, 64, 0] and index.header.version == 3
    assert index.header.class_set == read_classes(folder / "my.yaml").class_set
    assert not verify_shards(index.location, progress=lambda line: None).problems
    samples = (index.folder / "samples.npy").read_bytes()
    index.folder.rename(folder / "before")
    again = build_index(index.location, classes=read_classes(folder / "my.yaml"), progress=lambda line: None)
    assert samples == (opened(again).folder / "samples.npy").read_bytes()


def test_labels_of_16_bits_of_a_palette_and_of_colours(folder: Path) -> None:
    Image.fromarray(values({0: 20, 1: 300, 255: 0}, np.uint16)).save(_label(folder))
    np.testing.assert_array_equal(stored(make(folder)), INDICES)
    palette = Image.fromarray(values({0: 20, 1: 10, 255: 0}), mode="P")
    palette.putpalette([7] * 60 + [1, 0, 0] + [7] * 705)
    palette.save(_label(folder))
    np.testing.assert_array_equal(stored(make(folder, output=str(folder / "palette"))), INDICES)
    colors = "labels_as: colors\nclasses:\n  a: {color: [1, 0, 0]}\n  b: {color: [2, 0, 0]}\nignore: [[0, 0, 0]]\n"
    (folder / "my.yaml").write_text(colors)
    save(folder / "raw/labels/a.png", values({0: (1, 0, 0), 1: (2, 0, 0), 255: (0, 0, 0)}))
    np.testing.assert_array_equal(stored(make(folder, output=str(folder / "colors"))), INDICES)


def _label(folder: Path) -> Path:
    (folder / "raw/labels").mkdir(exist_ok=True)
    return folder / "raw/labels/a.png"


@pytest.mark.parametrize("kind", ["labelme", "cityscapes"])
def test_labels_of_polygons(folder: Path, kind: str) -> None:
    (folder / "my.yaml").write_text("labels_as: polygons\nclasses:\n  floor: {}\n  shelf: {ids: [rack]}\n")
    box = [[0, 0], [15, 7]]
    points = [[0, 8], [15, 8], [15, 15], [0, 15]]
    shapes: dict[str, Any] = {
        "labelme": {"imageWidth": 16, "imageHeight": 16, "shapes": [
            {"label": "floor", "points": box, "shape_type": "rectangle"}, {"label": "rack", "points": points}]},
        "cityscapes": {"imgWidth": 16, "imgHeight": 16, "objects": [
            {"label": "floor", "polygon": [[0, 0], [15, 0], [15, 7], [0, 7]]}, {"label": "rack", "polygon": points}]},
    }  # fmt: skip
    _label(folder).with_suffix(".json").write_text(json.dumps(shapes[kind]))
    np.testing.assert_array_equal(stored(make(folder)), np.repeat([[0], [1]], 8, 0) * np.ones((1, 16), int))


def test_labels_that_teach_nothing_are_counted(folder: Path) -> None:
    (folder / "my.yaml").write_text("labels_as: polygons\nclasses:\n  floor: {}\n  shelf: {}\n")
    line, box = {"label": "shelf", "points": [[0, 0], [9, 9]]}, [[0, 0], [9, 0], [9, 9]]
    shapes = {"a": [], "b": [line, line], "c": [line, {"label": "floor", "points": box}]}
    for name, found in shapes.items():
        save(folder / f"raw/images/{name}.png", np.full((16, 16, 3), 9, np.uint8))
        content = {"imageWidth": 16, "imageHeight": 16, "shapes": found}
        _label(folder).with_name(f"{name}.json").write_text(json.dumps(content))
    lines = list[str]()
    index = make(folder, progress=lines.append, image_format=ImageFormat.PNG)
    assert lines[-3:] == [
        f"2 samples show no class: all pixels of their labels are ignored, such as {folder}/raw/images/a.png",
        f"3 outlines have fewer than 3 points and are not drawn, such as {folder}/raw/images/b.png",
        f"{folder}/set shows none of: shelf",
    ]
    index.folder.rename(folder / "before")
    again = build_index(index.location, classes=read_classes(folder / "my.yaml"), progress=lines.append)
    assert again.passed_over.lines()[0].startswith("2 samples show no class")


def test_polygons_of_an_own_class_are_none_of_its_group(folder: Path) -> None:
    (folder / "my.yaml").write_text("labels_as: polygons\nclasses:\n  floor: {}\n  car: {}\n")
    content: dict[str, Any] = {"imgWidth": 16, "imgHeight": 16, "objects": [{"label": "cargroup", "polygon": []}]}
    _label(folder).with_suffix(".json").write_text(json.dumps(content))
    make(folder)
    content["objects"][0]["label"] = "floorgroup"
    _label(folder).with_suffix(".json").write_text(json.dumps(content))
    with pytest.raises(AssertionError, match=r"does not define: \['floorgroup'\]"):
        make(folder, output=str(folder / "other"))


def test_a_class_that_no_label_shows_says_so(folder: Path) -> None:
    save(folder / "raw/labels/a.png", values({0: 20, 1: 10, 255: 0}))
    (folder / "my.yaml").write_text(YAML.replace("ids: 41, ", ""))
    with pytest.raises(ValueError, match=r"--classes .*my.yaml: robot without `ids`; add those in the labels"):
        make(folder)
    (folder / "my.yaml").write_text(YAML.replace("ids: 41", "ids: []"))
    np.testing.assert_array_equal(stored(make(folder)), INDICES)


def test_sets_map_in_their_own_ways(folder: Path) -> None:
    save(folder / "raw/labels/a.png", values({0: 3, 1: 4, 255: 9}))
    (folder / "ids.yaml").write_text("{3: floor, 4: shelf, 9: ignore}")
    np.testing.assert_array_equal(stored(make(folder, mapping=str(folder / "ids.yaml"))), INDICES)
    (folder / "own.yaml").write_text(
        'images: "images/{n}.png"\nlabels: "labels/{n}.png"\nids: {3: floor, 4: shelf, 9: 255}\n'
    )
    own = make(folder, dataset=str(folder / "own.yaml"), output=str(folder / "own"))
    np.testing.assert_array_equal(stored(own), INDICES)
    (folder / "ids.yaml").write_text("{3: flor, 4: shelf, 9: ignore}")
    with pytest.raises(ValueError, match=r"--mapping .*ids.yaml: 3: 'flor' is no class of .*; did you mean floor\?"):
        make(folder, mapping=str(folder / "ids.yaml"))
    write_cityscapes(folder / "city", "val", 2)
    city = make(folder, dataset="cityscapes", split="val", input=str(folder / "city"), output=str(folder / "c"))
    assert city.header.class_pixels[2] == 0 < min(city.header.class_pixels[:2]), "road, and car with truck"


def test_ids_that_nothing_explains_are_refused_with_a_file_to_begin_with(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shards", "make", "--dataset", "folder", "--input", f"{folder}/raw", "--output", f"{folder}/set"]
    assert main(command) == 2
    assert capsys.readouterr().err.count("add --no-labels to this command") == 1
    save(folder / "raw/labels/a.png", values({0: 20, 1: 10, 255: 0}))
    assert main(command) == 2
    said = capsys.readouterr()
    assert (
        "1 of 1 label files hold the ids 20 (50.0%), 0 (25.0%), 10 (25.0%), and nothing says what they mean" in said.err
    )
    (folder / "proposed.yaml").write_text(said.out)
    assert main([*command, "--classes", f"{folder}/proposed.yaml"]) == 0, "the same command goes on"
    assert ShardIndex.open(folder / "set").header.class_set.names == ("class_1", "class_2", "class_3")


def test_the_file_proposed_for_masks_of_0_and_255_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(folder / "raw/labels/a.png", values({0: 0, 1: 255, 255: 255}))
    command = ["shards", "make", "--dataset", "folder", "--input", f"{folder}/raw", "--output", f"{folder}/set"]
    assert main(command) == 2
    (folder / "proposed.yaml").write_text(capsys.readouterr().out)
    assert main([*command, "--classes", f"{folder}/proposed.yaml"]) == 0
    assert ShardIndex.open(folder / "set").header.class_pixels == [128, 128]


def test_after_ids_that_are_missing_the_corrected_file_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(folder / "raw/labels/a.png", values({0: 20, 1: 10, 255: 5}))
    command = ["shards", "make", "--dataset", "folder", "--input", f"{folder}/raw", "--output", f"{folder}/set"]
    assert main([*command, "--classes", f"{folder}/my.yaml"]) == 1
    assert "holds ids that its data set or mapping does not define: [5]" in capsys.readouterr().err
    (folder / "my.yaml").write_text(YAML.replace("[0]", "[0, 5]"))
    assert main([*command, "--classes", f"{folder}/my.yaml"]) == 0
    said = capsys.readouterr()
    assert "shows none of: robot" in said.out + said.err
    assert main(["shards", "info", f"{folder}/set"]) == 0
    printed = capsys.readouterr().out
    assert "shelf" in printed and "road" not in printed


def test_a_run_refuses_sets_of_other_classes(folder: Path) -> None:
    save(folder / "raw/labels/a.png", values({0: 20, 1: 10, 255: 0}))
    own, cityscapes = make(folder).location, make_set(folder / "city", 2).location
    data = DataConfig(validation=DatasetConfig(shards=own), classes=f"{folder}/my.yaml")
    np.testing.assert_array_equal(next(iter(read_validation(data)))["labels"], INDICES)
    with pytest.raises(
        ValueError, match=r"of 3 classes \(floor, shelf, robot\), the run is of 19 .*set data.classes to"
    ):
        read_validation(DataConfig(validation=DatasetConfig(shards=own)))
    data = DataConfig(validation=DatasetConfig(shards=cityscapes), classes=f"{folder}/my.yaml")
    with pytest.raises(ValueError, match=r"of 19 classes \(road, .*\), the run is of 3 .*; make them again with"):
        read_validation(data)


def test_rare_classes_are_drawn_as_often_as_the_rarest() -> None:
    pixels = np.array([[900, 90, 10]] * 3)
    images = [np.arange(3, dtype=np.uint32)] * 3
    how = {"totals": pixels.sum(0), "members": [[0], [1], [2]], "seed": 0, "stream": "source", "temperature": 0.1}
    usual, marked = (
        RareClassOrder(pixels, images, min_pixels=0, rare=rare, **how).probabilities for rare in ((), (1,))
    )
    assert usual[1] < usual[2] and marked[1] == pytest.approx(marked[2]) and marked[0] < usual[1]
