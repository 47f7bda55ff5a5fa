"""Ranks that score together: an error of one is told once, in every order of errors, sums and signals."""

import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from iccld.programs.evaluate import scoring
from iccld.programs.evaluate.scoring import Reduction, never
from iccld.runtime.faults.preemption import Preempted
from iccld.runtime.ranks import Ranks


@dataclass(frozen=True)
class Two(Ranks):
    """This rank, and what another one tells; `gathered` has what this one told."""

    other: Exception | None = None
    wait_s: float = 0.0
    gathered: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        time.sleep(self.wait_s)
        self.gathered.append(value)
        return [value, self.other]


def scored(reduction: Reduction, *, before: Exception | None = None, after: Exception | None = None) -> torch.Tensor:
    with reduction.errors_shared():
        if before:
            raise before
        counts = reduction(torch.ones(2))
        if after:
            raise after
        return counts


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_a_rank_s_own_is_told_once(rank: int):
    ranks = Two(rank=rank)
    with pytest.raises((ValueError, SystemExit)) as raised:
        scored(Reduction(ranks, never), before=ValueError("sample 7"))
    assert [str(error) for error in ranks.gathered] == ["sample 7"]
    assert isinstance(raised.value, SystemExit) == (rank == 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_another_rank_ends_this_one_before_the_sum(rank: int):
    ranks = Two(rank=rank, other=ValueError("sample 7"))
    with pytest.raises((ValueError, SystemExit)):
        scored(Reduction(ranks, never))
    assert ranks.gathered == [None]


def test_what_comes_after_the_sum_is_met_by_all_and_not_told_again():
    ranks = Two()
    with pytest.raises(ValueError, match="the report"):
        scored(Reduction(ranks, never), after=ValueError("the report"))
    assert ranks.gathered == [None] and scored(Reduction(Two(), never)).tolist() == [1, 1]


def test_a_signal_is_met_where_the_ranks_sum():
    ranks = Two()
    with pytest.raises(Preempted):
        scored(Reduction(ranks, lambda done, total: True))
    assert ranks.gathered == [None]


def test_a_rank_that_waits_for_the_others_shows_that_it_lives(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "LIFE_S", 0.01)
    asked = list[tuple[int, int]]()
    with pytest.raises(ValueError, match="sample 7"):
        scored(
            Reduction(Two(wait_s=0.5), lambda *done: bool(asked.append(done)), total=4), before=ValueError("sample 7")
        )
    assert asked and set(asked) == {(4, 4)}
