"""The loop's learning-rate schedule, and errors that it tells to all ranks."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccld.settings import ScheduleConfig
from iccld.trainer import Trainer, learning_rate_factor


def test_the_published_schedule():
    rates = [6e-5 * learning_rate_factor(step, num_steps=40_000, config=ScheduleConfig()) for step in (49, 99)]
    assert rates == pytest.approx([1.958e-6, 3.950e-6], rel=3e-4)


@given(st.integers(1, 5000), st.integers(0, 3000), st.floats(0, 1))
def test_the_factor_stays_between_zero_and_one_and_falls_after_the_warm_up(num_steps: int, warmup: int, final: float):
    config = ScheduleConfig(warmup_steps=warmup, final_ratio=final)
    factors = [learning_rate_factor(step, num_steps=num_steps, config=config) for step in range(num_steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_a_ratio_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"final_ratio=2.0 must be between 0 and 1"):
        ScheduleConfig(final_ratio=2.0)


def test_what_a_write_to_the_view_cache_has_met_is_told_to_all_ranks():
    def fail() -> None:
        raise ValueError("stage2.cache: features")

    here = SimpleNamespace(
        stage=SimpleNamespace(view_cache=SimpleNamespace(raise_failures=fail)),
        layout=SimpleNamespace(num_accumulation=1),
        watchdog=SimpleNamespace(has_trained=True),
    )
    batches, failure = Trainer._fetch(cast(Any, here), iter([{}]))
    assert batches == [] and isinstance(failure, ValueError) and str(failure) == "stage2.cache: features"
