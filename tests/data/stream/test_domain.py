from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iccld.data.config import ClassSetConfig, DataConfig
from iccld.data.stream.domain import (
    CROP_TRIES,
    Crop,
    DomainStream,
    draw_crop,
    relabel,
    source_merit,
    valid_rows,
    window_of,
)
from iccld.data.stream.stream import TrainingStream
from iccld.data.stream.validation import read_validation
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


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(height=st.integers(8, 40), width=st.integers(8, 40), seed=st.integers(0, 10**6))
def test_crops_lie_inside(height: int, width: int, seed: int) -> None:
    crop = draw_crop((height, width), (8, 8), flip_probability=0.5, generator=generator(seed))
    image = np.arange(height * width).reshape(height, width)
    window = window_of(image, crop, (8, 8))
    assert window.shape == (8, 8) and window[0, 0] == crop.top * width + crop.left


def test_every_position_and_half_of_the_flips_occur() -> None:
    crops = [draw_crop((10, 9), (8, 8), flip_probability=0.5, generator=generator(i)) for i in range(600)]
    positions, counts = np.unique([(crop.top, crop.left) for crop in crops], axis=0, return_counts=True)
    assert len(positions) == 6 and counts.min() > 60
    assert 0.4 < np.mean([crop.flip for crop in crops]) < 0.6


@pytest.mark.parametrize(("chance", "expected"), [(0.0, False), (1.0, True)])
def test_flip_is_a_probability(chance: float, expected: bool) -> None:
    assert all(
        draw_crop((8, 8), (8, 8), flip_probability=chance, generator=generator(i)).flip is expected for i in range(50)
    )


def test_merit_counts_the_wanted_class_and_the_largest_share() -> None:
    window = np.full((4, 4), 255, np.uint8)
    assert source_merit(window, max_class_share=0.75) == 2, "nothing labelled is not varied"
    window[:2] = 0
    assert source_merit(window, max_class_share=0.75) == 2, "one class is all that is labelled"
    window[1, :2] = 1
    assert source_merit(window, max_class_share=0.75) == 3, "6 of 8 are not above 75 %"
    assert source_merit(window, max_class_share=0.7) == 2
    assert source_merit(window, max_class_share=0.75, wanted_class=1, wanted_pixels=2) == 3
    assert source_merit(window, max_class_share=0.75, wanted_class=1, wanted_pixels=3) == 1


def test_crops_are_drawn_again_until_they_are_good_and_at_most_ten_times() -> None:
    tried: list[Crop] = []

    def never(crop: Crop) -> int:
        tried.append(crop)
        return 2 if len(tried) == 4 else 1

    best = draw_crop((64, 64), (8, 8), flip_probability=0.5, generator=generator(), merit=never)
    assert len(tried) == CROP_TRIES and best == tried[3], "the best of ten bad ones"
    tried.clear()
    found = draw_crop(
        (64, 64), (8, 8), flip_probability=0.5, generator=generator(), merit=lambda crop: 3 * (crop.left > 40)
    )
    assert found.left > 40


def test_margins_stay_with_the_image() -> None:
    rows = np.concatenate(
        [valid_rows(64, Crop(top, 0, False), 16, margin_top=0.1, margin_bottom=0.25) for top in (0, 16, 32, 48)]
    )
    np.testing.assert_array_equal(rows, (np.arange(64) >= 6) & (np.arange(64) < 48))
    assert valid_rows(64, Crop(3, 0, True), 61, margin_top=0.0, margin_bottom=0.0).all()
