"""Statements that scores over seeds allow."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccld.programs.ablate.paired import Estimate, choose_images, estimate, judgement, paired_difference

scores = st.floats(0, 100, allow_nan=False)
by_seed = st.dictionaries(st.integers(0, 9), scores, max_size=6)


@given(st.lists(scores, min_size=2, max_size=9))
def test_mean_and_spread_are_those_of_the_slow_formulas(values: list[float]):
    found = estimate(values)
    assert found is not None and found.std is not None and found.se is not None
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    assert found.n == len(values)
    assert found.mean == pytest.approx(mean) and found.std == pytest.approx(math.sqrt(variance), abs=1e-6)
    assert found.se == pytest.approx(found.std / math.sqrt(len(values)))


def test_one_value_has_no_spread_and_none_has_no_mean():
    assert estimate([3.0]) == Estimate(3.0, None, None, 1)
    assert estimate([]) is None and paired_difference({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="finite"):
        estimate([math.nan])


@given(by_seed, by_seed, st.floats(-10, 10))
def test_a_paired_difference_changes_sign_with_its_sides_and_follows_a_shift(
    one: dict[int, float], other: dict[int, float], shift: float
):
    found, back = paired_difference(one, other), paired_difference(other, one)
    common = one.keys() & other.keys()
    if not common:
        assert found is None and back is None
        return
    assert found is not None and back is not None and found.n == len(common)
    assert found.mean == pytest.approx(-back.mean) and found.std == pytest.approx(back.std)
    moved = paired_difference({seed: value + shift for seed, value in one.items()}, other)
    assert moved is not None and moved.mean == pytest.approx(found.mean + shift, abs=1e-6)


@given(by_seed, st.floats(-10, 10), st.dictionaries(st.integers(0, 9), st.floats(-50, 50), max_size=6))
def test_what_both_share_leaves_no_trace_in_the_spread(one: dict[int, float], gain: float, level: dict[int, float]):
    """Seeds differ by a lot and the gain is the same in all: the paired error is 0, whatever the means' spread is."""
    baseline = {seed: value + level.get(seed, 0.0) for seed, value in one.items()}
    found = paired_difference({seed: value + gain for seed, value in baseline.items()}, baseline)
    assert found is None or found.se is None or found.se == pytest.approx(0, abs=1e-6)


@given(st.floats(-10, 10), st.floats(0, 5), st.integers(2, 9))
def test_better_and_worse_are_said_from_two_standard_errors_on(mean: float, se: float, n: int):
    word = judgement(Estimate(mean, se * math.sqrt(n), se, n))
    if mean and abs(mean) >= 2 * se:
        assert word == ("better" if mean > 0 else "worse")
    else:
        assert word == "no difference shown"
    assert word != judgement(Estimate(-mean, se, se, n)) or word == "no difference shown"


@pytest.mark.parametrize("difference", [None, Estimate(50.0, None, None, 1), Estimate(0.0, 0.0, 0.0, 3)])
def test_nothing_is_said_of_one_seed_or_of_none(difference: Estimate | None):
    assert judgement(difference) == "no difference shown"


@given(st.floats(-99, 99), st.integers(2, 9), st.floats(0, 9))
def test_no_mean_is_shown_without_its_spread(mean: float, n: int, se: float):
    for usual_n in (0, 1, n):
        assert "±" in Estimate(mean, se, se, n).words(usual_n=usual_n)
    assert Estimate(mean, None, None, 1).words().endswith("(1 seed, spread unknown)")
    assert Estimate(mean, None, None, 1).words(usual_n=3).endswith("(1 seed, spread unknown)")
    assert Estimate(mean, None, None, 1).words(usual_n=1).endswith("± ?")


@given(st.dictionaries(st.integers(0, 99), st.one_of(scores, st.just(math.nan)), min_size=1, max_size=30))
def test_best_median_and_worst_image_are_what_they_are_called(values: dict[int, float]):
    known = {number: value for number, value in values.items() if not math.isnan(value)}
    if not known:
        with pytest.raises(ValueError, match="no validation image"):
            choose_images(values)
        return
    chosen = choose_images(values)
    assert list(chosen) == ["best", "median", "worst"][: len(known)] or list(chosen) == ["best", "worst"]
    assert len(set(chosen.values())) == len(chosen) == min(len(known), 3)
    assert known[chosen["best"]] == max(known.values())
    assert "worst" not in chosen or known[chosen["worst"]] == min(known.values())
    if "median" in chosen:
        assert known[chosen["median"]] == statistics.median_low(known.values())


@given(st.permutations(range(12)), st.lists(st.integers(0, 5), min_size=12, max_size=12))
def test_the_choice_does_not_depend_on_the_order_of_the_images(order: list[int], values: list[int]):
    images = {number: float(values[number]) for number in range(12)}
    assert choose_images({number: images[number] for number in order}) == choose_images(images)
