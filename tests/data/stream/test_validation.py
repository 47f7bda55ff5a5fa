"""Ranks read the labelled images of the validation sets together, each once."""

import numpy as np
import pytest

from iccld.data.config import SetConfig
from iccld.data.stream.validation import read_validation, read_validation_pairs
from tests.data.factory import config, random_pair


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
