"""A YAML of classes: what it says, and one line, with the file and the line, for each way in which it is wrong."""

from pathlib import Path

import pytest

from iccld.data.classes import proposed_yaml, read_classes, voc_color
from iccld.data.config import ClassSetConfig, DataConfig
from iccld.labels import IGNORE_INDEX

GOOD = """\
classes:
  floor: {ids: 1, color: [1, 2, 3]}
  shelf: {ids: [2, 7], color: "#0a0b0c", thing: true}
  robot: {ids: 65535, rare: true, thing: true, cityscapes: [car, truck]}
ignore: 0
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


def test_what_a_file_says(tmp_path: Path) -> None:
    found = read_classes(written(tmp_path, GOOD))
    own = found.class_set
    assert own.names == own.id_names == ("floor", "shelf", "robot")
    assert own.palette == ((1, 2, 3), (10, 11, 12), (128, 0, 0)), "the first colour of the map that is free"
    assert (own.rare, own.things) == ((2,), (1, 2))
    assert found.ids == {1: 0, 2: 1, 7: 1, 65535: 2, 0: IGNORE_INDEX, 255: IGNORE_INDEX}
    assert found.of_cityscapes == {13: 2, 14: 2}
    assert [found.index_of(value, "x") for value in ("shelf", "ignore", 13, 0, 255, None)] == [
        1,
        255,
        2,
        255,
        255,
        None,
    ]


def test_colours_and_polygons_have_their_own_ids(tmp_path: Path) -> None:
    colors = (
        "labels_as: colors\nclasses:\n  a: {color: [0, 0, 7]}\n  b: {ids: [[1, 2, 3], '#000000']}\nignore: [[9, 9, 9]]"
    )
    assert read_classes(written(tmp_path, colors)).ids == {"0 0 7": 0, "1 2 3": 1, "0 0 0": 1, "9 9 9": 255}
    names = "labels_as: polygons\nclasses:\n  a: {}\n  b: {ids: [c, d]}\nignore: e"
    assert read_classes(written(tmp_path, names)).ids == {"a": 0, "c": 1, "d": 1, "e": 255}


def many(count: int) -> str:
    return "classes:\n" + "".join(f"  c{i}: {{ids: {i}}}\n" for i in range(count))


def test_up_to_254_classes_each_of_its_own_colour(tmp_path: Path) -> None:
    own = read_classes(written(tmp_path, many(254))).class_set
    assert own.num_classes == len(set(own.palette)) == 254


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ids: 1,", "ids: 2,", r"my.yaml:3: classes.shelf: id 2 is that of classes.floor; an id belongs to one class"),
        ("ignore: 0", "ignore: 7", r"my.yaml:5: ignore: id 7 is that of classes.shelf"),
        ("[2, 7]", "[2, 2]", r"my.yaml:3: classes.shelf: id 2 twice"),
        ('"#0a0b0c"', "[1, 2, 3]", r"my.yaml:3: classes.shelf.color=\[1, 2, 3\] is that of floor"),
        ("[1, 2, 3]", "[1, 2, 256]", r"my.yaml:2: classes.floor: color=\[1, 2, 256\] must be \[red, green, blue\]"),
        ('"#0a0b0c"', "'#0a0b0x'", r"my.yaml:3: classes.shelf: color=#0a0b0x must be"),
        ("65535", "65536", r"my.yaml:4: classes.robot: id 65536 must be a number from 0 to 65535"),
        ("ids: 1,", "ids: -1,", r"my.yaml:2: classes.floor: id -1 must be a number"),
        ("ids: 1,", "ids: yes,", r"my.yaml:2: classes.floor: id True must be a number"),
        ("  shelf:", "  floor:", r"my.yaml:3: names 'floor' twice"),
        ("rare: true", "rate: true", r"my.yaml:4: classes.robot.rate is no key; did you mean rare\?"),
        ("ignore: 0", "ignored: 0", r"my.yaml:5: ignored is no key; did you mean ignore\?"),
        ("ignore: 0", "labels_as: color", r"my.yaml:5: labels_as=color is none of ids, red16, colors, polygons"),
        ("rare: true", "rare: 1", r"my.yaml:4: classes.robot.rare=1 must be true or false"),
        ("car, truck", "cra, truck", r"my.yaml:4: classes.robot.cityscapes: 'cra' is no class of Cityscapes; .* car\?"),
        ("car, truck", "car, car", r"classes.robot.cityscapes: 'car' becomes two classes"),
        ("  floor: {", "  7: {", r"my.yaml:2: classes.7: a class is a name"),
        ("{ids: 1, color: [1, 2, 3]}", "1", r"my.yaml:2: classes.floor must be as in"),
        ("classes:", "class:", r"my.yaml: `classes:` is missing; write one line a class"),
        ("[2, 7]", "[2, 7", r"my.yaml:\d: .*expected"),
        (GOOD, many(255), r"my.yaml:1: classes: 255 of them; there must be 2 to 254"),
        (GOOD, many(1), r"classes: 1 of them; there must be 2 to 254"),
        (GOOD, "", r"my.yaml: `classes:` is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=message) as failure:
        read_classes(written(tmp_path, GOOD.replace(old, new, 1)))
    assert "\n" not in str(failure.value)


def test_a_missing_file_and_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.yaml: the file of classes cannot be read \(No such file"):
        read_classes(tmp_path / "none.yaml")
    found = read_classes(written(tmp_path, GOOD))
    with pytest.raises(ValueError, match=r"x: 'shelv' is no class of .*my.yaml; did you mean shelf\?"):
        found.index_of("shelv", "x")
    plain = read_classes(written(tmp_path, many(3)))
    with pytest.raises(ValueError, match=r"x: 13 is a Cityscapes train id, and no class of .*my.yaml says which"):
        plain.index_of(13, "x")


def test_a_proposal_can_be_read(tmp_path: Path) -> None:
    text = proposed_yaml({10: 0.5, 2: 0.25, 255: 0.25}, labels_as="ids")
    assert read_classes(written(tmp_path, text)).ids == {2: 0, 10: 1, 255: 255}
    assert "ignore: [255]  # 25.00% of the pixels; make it a class if it is one" in text
    text = proposed_yaml({"1 2 3": 0.5, "0 0 0": 0.5}, labels_as="colors")
    assert read_classes(written(tmp_path, text)).ids == {"0 0 0": 0, "1 2 3": 1}
    assert [voc_color(i) for i in (1, 2, 15)] == [[128, 0, 0], [0, 128, 0], [192, 128, 128]]


@pytest.mark.parametrize(
    ("shares", "labels_as", "ids"),
    [
        ({0: 0.4, 255: 0.6}, "ids", {0: 0, 255: 1}),
        ({255: 1.0}, "ids", {255: 0}),
        ({7: 1.0}, "ids", {7: 0, 255: 255}),
        ({"0 0 0": 1.0}, "colors", {"0 0 0": 0}),
    ],
)
def test_a_proposal_for_masks_can_be_read(tmp_path: Path, shares, labels_as: str, ids) -> None:
    found = read_classes(written(tmp_path, proposed_yaml(shares, labels_as=labels_as)))
    assert found.ids == ids and found.class_set.num_classes == 2 and not found.without_ids


def test_a_run_keeps_the_content_of_the_file(tmp_path: Path) -> None:
    path = str(written(tmp_path, GOOD))
    data = DataConfig(classes=path)
    assert data.classes == "" and data.class_set.build() == read_classes(path).class_set
    assert DataConfig(classes=path, class_set=data.class_set).class_set == data.class_set
    with pytest.raises(ValueError, match=r"data.classes=.*my.yaml and data.class_set \(a, .*are different classes"):
        DataConfig(classes=path, class_set=ClassSetConfig(["a", "b"], {0: 0, 1: 1}))
    with pytest.raises(ValueError, match="colors, of classes of one's own, and of_train_id exclude each other"):
        ClassSetConfig(["a", "b"], {0: 0, 1: 1}, colors=[[1, 2, 3], [4, 5, 6]]).build()
