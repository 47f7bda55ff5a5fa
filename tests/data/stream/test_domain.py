from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iccld.data.config import ClassSetConfig, DataConfig, SetConfig
from iccld.data.stream.domain import DomainStream, relabel
from iccld.data.stream.stream import TrainingStream, read_validation, read_validation_pairs
from tests.data.factory import CROP, HEIGHT, config, layout, make_set, random_pair


def domains(data: DataConfig) -> dict[str, DomainStream]:
    return TrainingStream(data, seed=0, layout=layout()).domains


def test_images_and_labels_are_the_same_window_of_their_sample(folders: dict[str, str]) -> None:
    source = domains(config(folders))["source"].batch(range(24, 32))
    for j, key in enumerate(source["keys"]):
        image, train_ids = random_pair(int(key.removeprefix("frame_")))
        crop = source["images"][j].numpy().transpose(1, 2, 0)
        places = [
            (flipped_ids[top : top + CROP[0], left : left + CROP[1]])
            for flipped, flipped_ids in ((image, train_ids), (image[:, ::-1], train_ids[:, ::-1]))
            for top in range(9)
            for left in range(9)
            if np.array_equal(flipped[top : top + CROP[0], left : left + CROP[1]], crop)
        ]
        assert len(places) == 1
        np.testing.assert_array_equal(source["labels"][j].numpy(), places[0])


def test_margins_are_rows_of_the_image(folders: dict[str, str]) -> None:
    margins = {"target_margin_top": 0.125, "target_margin_bottom": 0.25}
    batch = {name: d.batch(range(8)) for name, d in domains(config(folders, crop_size=[HEIGHT, 32], **margins)).items()}
    expected = (torch.arange(HEIGHT) >= 3) & (torch.arange(HEIGHT) < 18)
    assert torch.equal(batch["target"]["valid"], expected[None, :, None].expand(8, HEIGHT, 1))
    assert batch["source"]["valid"].all()


def test_rare_classes_show_in_their_crops(folders: dict[str, str]) -> None:
    data = config({"source": folders["source"]}, crop_size=[16, 16])
    domain = domains(data)["source"]
    shown = []
    for number in range(200):
        wanted = domain.order[number].wanted_class
        labels = domain.batch([number])["labels"]
        shown.append(int((labels == wanted).sum()) >= 20)
    assert np.mean(shown) > 0.95


def test_no_class_fills_a_source_crop_where_that_can_be_helped(folders: dict[str, str]) -> None:
    def share_of_filled_crops(max_class_share: float) -> float:
        data = config(folders, crop_size=[8, 8], rare_class_sampling=False, max_class_share=max_class_share)
        labels = domains(data)["source"].batch(range(200))["labels"].numpy()
        counts = np.stack([np.bincount(window.ravel(), minlength=256)[:255] for window in labels])
        return float(np.mean(counts.max(1) > 0.5 * counts.sum(1)))

    assert share_of_filled_crops(0.5) < 0.25 * share_of_filled_crops(1.0)


def test_one_image_is_cropped_and_mirrored_anew_each_time(tmp_path: Path) -> None:
    data = config({"source": make_set(tmp_path, 1).location}, rare_class_sampling=False, max_class_share=1.0)
    images = domains(data)["source"].batch(range(64))["images"]
    assert len({image.numpy().tobytes() for image in images}) > 40


@given(seed=st.integers(0, 10**6))
def test_relabel_is_a_table_lookup(seed: int) -> None:
    generator = np.random.default_rng(seed)
    table, ids = generator.integers(0, 256, 256, dtype=np.uint8), generator.integers(0, 256, (7, 5), dtype=np.uint8)
    np.testing.assert_array_equal(relabel(ids, table), table[ids])
    np.testing.assert_array_equal(relabel(ids[:, ::-1], table), table[ids[:, ::-1]])


def test_merged_classes(folders: dict[str, str]) -> None:
    merged = ClassSetConfig(["flat", "object"], {0: 0, 1: 0, 5: 1, 6: 1, 7: 1})
    data = config(folders, class_set=merged)
    batch = domains(data)["source"].batch(range(8))
    assert set(batch["labels"].unique().tolist()) == {0, 1, 255}
    for sample in read_validation(data):
        train_ids = random_pair(sample["number"])[1]
        expected = np.select([train_ids <= 1, (train_ids >= 5) & (train_ids <= 7)], [0, 1], 255)
        np.testing.assert_array_equal(sample["labels"], expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_validation_is_read_once_by_all_ranks_together(folders: dict[str, str], world_size: int) -> None:
    parts = [list(read_validation(config(folders), rank=rank, world_size=world_size)) for rank in range(world_size)]
    found = sorted((sample for part in parts for sample in part), key=lambda sample: sample["number"])
    assert [sample["key"] for sample in found] == [f"frame_{i:03d}" for i in range(13)]
    for i, sample in enumerate(found):
        np.testing.assert_array_equal(sample["image"], random_pair(i)[0])
        np.testing.assert_array_equal(sample["labels"], random_pair(i)[1])
        assert sample["image"].flags.writeable and sample["labels"].flags.writeable, "torch.from_numpy wants that"


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize(
    ("most", "below", "expected"),
    [
        (4, 0, [(0, 6), (3, 9), (6, 0), (9, 3)]),
        (3, 6, [(0, 2), (2, 4), (4, 0)]),
        (99, 5, [(0, 2), (1, 3), (2, 4), (3, 0), (4, 1)]),
        (1, 0, [(0, None)]),
    ],
)
def test_pairs_are_spread_over_the_set_and_far_apart_on_any_number_of_ranks(
    folders: dict[str, str], world_size: int, most: int, below: int, expected: list[tuple[int, int | None]]
) -> None:
    ranks = [
        list(read_validation_pairs(config(folders), most=most, below=below, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    pairs = sorted((pair for rank in ranks for pair in rank), key=lambda pair: pair[0]["number"])
    assert [(one["number"], other and other["number"]) for one, other in pairs] == expected
    for sample in (sample for pair in pairs for sample in pair if sample):
        assert sample["key"] == f"frame_{sample['number']:03d}"
        np.testing.assert_array_equal(sample["labels"], random_pair(sample["number"])[1])


def test_samples_of_several_validation_sets_are_found_by_their_numbers(folders: dict[str, str]) -> None:
    data = config(folders)
    data.validation.also = {"more": SetConfig(shards=data.validation.shards, first_percent=30)}
    whole = [(sample["number"], sample["key"]) for sample in read_validation(data)]
    assert len(whole) == 13 + 4
    pairs = list(read_validation_pairs(data, most=17))
    assert [(one["number"], one["key"]) for one, _ in pairs] == whole
    assert [other and other["number"] for _, other in pairs] == [(i + 8) % 17 for i in range(17)]
