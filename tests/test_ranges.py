"""Ranges of numbers among the settings, and the line that states a range."""

import math
from types import SimpleNamespace

import pytest

from iccld.config import load_config
from iccld.ranges import Range, above, at_least, between, check_ranges, off_or_above, share


@pytest.mark.parametrize(
    ("range_", "good", "bad"),
    [
        (at_least(1), (1, 7.5), (0, 0.9)),
        (off_or_above(), (0, 3), (-1e-9,)),
        (above(0), (1e-9, 3), (0, -1)),
        (between(0, 0.5), (0, 0.5), (-0.1, 0.6)),
        (share(), (1e-9, 1), (0, 1.1)),
    ],
)
def test_the_ends_of_a_range(range_: Range, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    for value in good:
        check_ranges(SimpleNamespace(x=value), "a.b", x=range_)
    for value in (*bad, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^a.b.x={value} must be "):
            check_ranges(SimpleNamespace(x=value), "a.b", x=range_)


def test_a_remedy_comes_last() -> None:
    with pytest.raises(ValueError, match=r"^x=0 must be at least 1; 4 is usual\.$"):
        check_ranges(SimpleNamespace(x=0), "", x=at_least(1, "4 is usual"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage2.trainer.num_steps=0", "stage2.trainer.num_steps=0 must be at least 1."),
        ("stage2.trainer.schedule.warmup_ratio=2", "stage2.trainer.schedule.warmup_ratio=2.0 must be between 0 and 1."),
        ("stage1.objective.corruption.block=0", "stage1.objective.corruption.block=0 must be at least 1; 16 pixels"),
        ("+data.source.also={b:{shards:s,weight:0}}", "data.source.also.b.weight=0.0 of s must be positive"),
        ("data.crop_size=[5,5]", "data.crop_size=[5, 5] must be"),
        ("statistics_samples=0", "statistics_samples=0 must be at least 1"),
    ],
)
def test_the_loader_names_the_whole_path(override: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_config([override])
    assert str(refused.value).startswith(message)
