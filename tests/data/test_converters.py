import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.data.converters import CONVERTERS, Pair
from iccld.data.converters.base import map_ids
from iccld.labels import CITYSCAPES_ID_TO_TRAIN_ID
from tests.data.factory import random_pair, save, write_cityscapes, write_folder, write_gta5


def converted(dataset: str, root: Path, split: str = "", mapping: Path | None = None) -> list[tuple[Pair, np.ndarray]]:
    converter = CONVERTERS[dataset].open(root, split, mapping)
    return [(pair, converter.train_ids(pair.label)) for pair in converter.pairs() if pair.label]


def assert_random_pairs(pairs: list[tuple[Pair, np.ndarray]], order: list[int]) -> None:
    assert len(pairs) == len(order)
    for i, (pair, train_ids) in zip(order, pairs, strict=True):
        image, expected = random_pair(i)
        np.testing.assert_array_equal(np.asarray(Image.open(pair.image)), image)
        np.testing.assert_array_equal(train_ids, expected)
        assert train_ids.dtype == np.uint8


def test_gta5(tmp_path: Path) -> None:
    pairs = converted("gta5", write_gta5(tmp_path, 3))
    assert [pair.key for pair, _ in pairs] == ["00000", "00001", "00002"]
    assert_random_pairs(pairs, [0, 1, 2])


def test_cityscapes(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, "train", 4)
    write_cityscapes(tmp_path, "val", 1)
    pairs = converted("cityscapes", tmp_path, "train")
    assert [pair.key for pair, _ in pairs][:2] == ["city0_000000_000019", "city0_000002_000019"]
    assert_random_pairs(pairs, [0, 2, 1, 3])
    assert_random_pairs(converted("cityscapes", tmp_path, "val"), [0])


def test_plain_folder_with_and_without_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", 3)
    assert_random_pairs(converted("folder", tmp_path, "val"), [0, 1, 2])
    assert_random_pairs(converted("folder", tmp_path / "val"), [0, 1, 2])


@pytest.mark.parametrize("name", ["map.json", "map.yaml"])
def test_plain_folder_with_mapping(tmp_path: Path, name: str) -> None:
    save(tmp_path / "images" / "a" / "x.png", np.zeros((2, 2, 3), np.uint8))
    save(tmp_path / "labels" / "a" / "x.png", np.array([[100, 7], [7, 3]], np.uint16))
    mapping = {100: 0, 7: 18, 3: 255}
    text = json.dumps(mapping) if name.endswith("json") else "\n".join(f"{old}: {new}" for old, new in mapping.items())
    (tmp_path / name).write_text(text)
    ((pair, train_ids),) = converted("folder", tmp_path, mapping=tmp_path / name)
    assert pair.key == "a/x"
    assert train_ids.tolist() == [[0, 18], [18, 255]]


@pytest.mark.parametrize(("dataset", "num_ids"), [("gta5", 35), ("cityscapes", 34)])
def test_defined_ids_that_are_not_evaluated_are_ignored_and_others_are_errors(dataset: str, num_ids: int) -> None:
    converter = CONVERTERS[dataset].open(Path(), "train" if dataset == "cityscapes" else "", None)
    mapped = map_ids(np.arange(num_ids)[None], converter.ids)[0]
    assert mapped.tolist() == [CITYSCAPES_ID_TO_TRAIN_ID.get(i, 255) for i in range(num_ids)]
    with pytest.raises(ValueError, match=rf"does not define: \[{num_ids}, 200\]"):
        map_ids(np.array([[7, 200, num_ids]]), converter.ids)


def test_ids_may_have_16_bits_and_no_more() -> None:
    assert map_ids(np.array([[65535]], np.uint16), {65535: 4}).tolist() == [[4]]
    with pytest.raises(ValueError, match="ids up to 65536; ids must be below 65536"):
        map_ids(np.array([[65536]], np.int32), {65536: 4})


def test_labels_of_several_channels_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "color.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"several channels .* one id a pixel"):
        CONVERTERS["folder"].open(tmp_path, "", None).train_ids(tmp_path / "color.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file; write {old id: train id}"),
        ("{1: 19}", r"\[19\] on the right-hand side"),
        ("{}", "nothing on the right-hand side"),
        ("[1, 2]", "is no mapping of numbers"),
        ("{road: 0}", "is no mapping of numbers"),
        ("{1: 0", "is no mapping of numbers"),
    ],
)
def test_bad_mapping_files_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "map.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"--mapping .*map.yaml.* ?{message}"):
        CONVERTERS["folder"].open(tmp_path, "", path)


def test_splits_and_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--split val: gta5 has no folders of splits; leave --split out"):
        CONVERTERS["gta5"].open(tmp_path, "val", None)
    with pytest.raises(ValueError, match=r"--split is missing: .* use --split train or val"):
        CONVERTERS["cityscapes"].open(tmp_path, "", None)
    with pytest.raises(ValueError, match="leftImg8bit/test is missing; Cityscapes is laid out as"):
        CONVERTERS["cityscapes"].open(tmp_path, "test", None).pairs()
    (tmp_path / "images").mkdir()
    for dataset in ("gta5", "folder"):
        with pytest.raises(ValueError, match=r"images holds no images; .* is laid out as"):
            CONVERTERS[dataset].open(tmp_path, "", None).pairs()
