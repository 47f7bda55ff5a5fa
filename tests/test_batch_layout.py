"""The one division of a step's samples."""

import pytest

from iccld.batch_layout import BatchLayout


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(1, 1), (2, 3), (12, 1), (1, 12), (3, 4)])
def test_every_sample_of_a_step_is_one_rank_s_once(micro_batch_size: int, world_size: int) -> None:
    layouts = [BatchLayout(12, micro_batch_size, world_size=world_size, rank=rank) for rank in range(world_size)]
    numbers = [n for of in layouts for i in range(of.num_accumulation) for n in of.numbers(5, i)]
    assert sorted(numbers) == list(range(60, 72)) and len(numbers) == world_size * layouts[0].rank_batch_size
    assert all(len(of.numbers(0, 0)) == micro_batch_size for of in layouts)


def test_the_ranks_of_a_micro_batch_lie_side_by_side() -> None:
    layouts = [BatchLayout(8, 2, world_size=2, rank=rank) for rank in range(2)]
    assert [list(of.numbers(1, 1)) for of in layouts] == [[12, 13], [14, 15]]


def test_what_cannot_be_divided_is_refused() -> None:
    words = r"trainer.global_batch_size=8 must be a multiple of micro_batch_size=3 x 2 ranks; use a multiple of 6, or a"
    with pytest.raises(ValueError, match=words):
        BatchLayout(8, 3, world_size=2)
    with pytest.raises(ValueError, match="global_batch_size=0 must be"):
        BatchLayout(0, 3)
    with pytest.raises(ValueError, match="rank=2 must be in 0-1"):
        BatchLayout(8, 4, world_size=2, rank=2)
