import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.data.storage.index import rank_samples
from iccld.data.stream.order import (
    EpochOrder,
    MixedOrder,
    Permutation,
    RareClassOrder,
    SubsetOrder,
    rare_class_probabilities,
)

SYNTHIA_SHARES = {
    "road": 18.64, "sidewalk": 20.30, "building": 30.33, "wall": 0.267, "fence": 0.278, "pole": 1.079, "light": 0.043,
    "sign": 0.110, "vegetation": 10.74, "sky": 7.16, "person": 4.41, "rider": 0.488, "car": 4.26, "bus": 1.459,
    "motorcycle": 0.211, "bicycle": 0.218,
}  # fmt: skip
SYNTHIA_PROBABILITIES = {
    "light": 15.44, "sign": 14.43, "motorcycle": 13.05, "bicycle": 12.97, "wall": 12.34, "fence": 12.21, "rider": 9.90,
    "pole": 5.48, "bus": 3.75,
}  # fmt: skip


@given(size=st.integers(1, 300), key=st.integers(0, 2**63 - 1))
def test_a_permutation_has_every_element_once(size: int, key: int) -> None:
    assert sorted(Permutation(size, key)) == list(range(size))


@given(size=st.integers(10**6, 10**12), key=st.integers(0, 2**63 - 1))
def test_no_two_places_of_a_large_set_have_one_element(size: int, key: int) -> None:
    permutation, positions = Permutation(size, key), set(np.random.default_rng(key).integers(size, size=100).tolist())
    values = {permutation[position] for position in positions}
    assert len(values) == len(positions) and min(values) >= 0 and max(values) < size


@pytest.mark.parametrize("size", [2, 3, 5, 12])
def test_every_element_comes_everywhere_equally_often(size: int) -> None:
    trials = 4000
    counts = np.zeros((size, size))
    for key in range(trials):
        for position, value in enumerate(Permutation(size, key)):
            counts[position, value] += 1
    expected = trials / size
    chi_square = ((counts - expected) ** 2 / expected).sum(1)
    assert chi_square.max() < size - 1 + 6 * np.sqrt(2 * size)


def test_neighbours_do_not_stay_neighbours() -> None:
    values = np.array(list(Permutation(5000, 7)))
    assert abs(np.corrcoef(values, np.arange(5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.05
    assert (np.abs(np.diff(values)) == 1).mean() < 0.01


def test_permutation_refuses_what_is_outside() -> None:
    with pytest.raises(IndexError, match=r"outside of range\(5\)"):
        Permutation(5, 0)[5]
    with pytest.raises(IndexError):
        Permutation(5, 0)[-1]
    with pytest.raises(ValueError, match="at least one element"):
        Permutation(0, 0)


def test_a_place_among_a_billion_takes_microseconds() -> None:
    order = EpochOrder(10**9, seed=0, stream="source")
    start = time.perf_counter()
    for number in range(5 * 10**8, 5 * 10**8 + 1000):
        order[number]
    assert (time.perf_counter() - start) / 1000 < 1e-3


@given(size=st.integers(1, 60), seed=st.integers(0, 1000), epoch=st.integers(0, 10**6))
def test_an_epoch_loses_and_repeats_nothing(size: int, seed: int, epoch: int) -> None:
    order = EpochOrder(size, seed=seed, stream="target")
    drawn = [order[epoch * size + i] for i in range(size)]
    assert sorted(draw.index for draw in drawn) == list(range(size))
    assert all(draw.wanted_class is None for draw in drawn)


def test_epochs_streams_and_seeds_differ() -> None:
    def epoch(number: int, **key: object) -> list[int]:
        order = EpochOrder(50, **{"seed": 0, "stream": "source", **key})  # type: ignore[arg-type]
        return [order[number * 50 + i].index for i in range(50)]

    assert len({tuple(epoch(0)), tuple(epoch(1)), tuple(epoch(0, seed=1)), tuple(epoch(0, stream="target"))}) == 4
    assert epoch(0) == epoch(0)


def test_rare_class_probabilities_are_the_published_ones() -> None:
    shares = np.array(list(SYNTHIA_SHARES.values()))
    found = dict(zip(SYNTHIA_SHARES, 100 * rare_class_probabilities(shares, temperature=0.01), strict=True))
    for name, expected in SYNTHIA_PROBABILITIES.items():
        assert found[name] == pytest.approx(expected, abs=0.011), name  # the shares are rounded


def test_absent_classes_are_never_drawn() -> None:
    probabilities = rare_class_probabilities(np.array([0, 10, 0, 90]), temperature=0.5)
    assert probabilities[[0, 2]].tolist() == [0, 0]
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[1] > probabilities[3]


def class_pixels() -> np.ndarray:
    """Class 0 everywhere, class 1 plenty in images 3 and 4 and little in 5, class 2 little in 6, class 3 nowhere."""
    pixels = np.zeros((8, 4), np.uint32)
    pixels[:, 0] = 1000
    pixels[[3, 4, 5], 1] = [50, 60, 5]
    pixels[6, 2] = 5
    return pixels


def rare_order(
    pixels: np.ndarray,
    members: list[list[int]] | None = None,
    temperature: float = 0.01,
    min_pixels: int = 3000,
    num_images: int | None = None,
) -> RareClassOrder:
    return RareClassOrder(
        pixels,
        rank_samples(pixels),
        totals=pixels.sum(0, dtype=np.int64),
        members=members or [[c] for c in range(pixels.shape[1])],
        seed=1,
        stream="source",
        temperature=temperature,
        min_pixels=min_pixels,
        num_images=num_images,
    )


def test_rare_class_order_draws_the_class_and_an_image_that_shows_it() -> None:
    order = rare_order(class_pixels(), temperature=0.5, min_pixels=20)
    draws = [order[n] for n in range(3000)]
    images = {c: {draw.index for draw in draws if draw.wanted_class == c} for c in range(4)}
    assert images == {0: set(range(8)), 1: {3, 4}, 2: {6}, 3: set()}
    shares = np.bincount([draw.wanted_class or 0 for draw in draws], minlength=4) / len(draws)
    np.testing.assert_allclose(shares, order.probabilities, atol=0.03)
    repeated = np.mean([first == second for first, second in itertools.pairwise(draws)])
    assert repeated < np.sum(shares**2), "neighbours are drawn apart"
    assert 0.4 < np.mean([draw.index == 3 for draw in draws if draw.wanted_class == 1]) < 0.6


@settings(max_examples=30)
@given(number=st.integers(0, 10**12))
def test_rare_class_order_remembers_nothing(number: int) -> None:
    first, second = rare_order(class_pixels()), rare_order(class_pixels())
    second[number + 1]
    assert first[number] == second[number]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_images_of_a_class_are_those_that_a_scan_would_find(data: st.DataObject) -> None:
    pixels = np.array(data.draw(st.lists(st.lists(st.integers(0, 6), min_size=5, max_size=5), min_size=1, max_size=8)))
    min_pixels, num_images = data.draw(st.integers(0, 7)), data.draw(st.integers(1, len(pixels)))
    members = [[0, 3], [1], [2, 4]]
    if not pixels[:num_images].any():
        return
    order = rare_order(pixels, members, temperature=10.0, min_pixels=min_pixels, num_images=num_images)
    pixels = pixels[:num_images]
    draws = [order[n] for n in range(600)]
    for c, ids in enumerate(members):
        many = (pixels[:, ids] > min_pixels).any(1)
        expected = np.flatnonzero(many if many.any() else pixels[:, ids].any(1))
        drawn = [draw.index for draw in draws if draw.wanted_class == c]
        assert set(drawn) == set(expected.tolist())
        if len(drawn) > 100:  # uniform, also where an image shows several of the class's train ids
            counts = np.bincount(drawn, minlength=len(pixels))[expected]
            assert counts.min() > 0.3 * counts.mean()


@pytest.mark.parametrize("num_images", [40, 900])
def test_the_first_images_of_a_long_list_are_drawn_evenly(num_images: int) -> None:
    """Images in reach are listed if they are few; if many, draws are repeated until one is in reach."""
    pixels = np.ones((2000, 1), np.uint32)
    order = rare_order(pixels, min_pixels=0, num_images=num_images)
    counts = np.bincount([order[n].index for n in range(30 * num_images)], minlength=num_images)
    assert len(counts) == num_images and counts.min() > 8 and counts.max() < 60


def test_rare_class_order_needs_a_labelled_pixel() -> None:
    with pytest.raises(ValueError, match=r"data.rare_class_sampling: no image of the source set .*class_set"):
        rare_order(np.zeros((3, 19), np.uint32))


def test_a_subset_is_followed_as_a_set_of_its_own() -> None:
    order = SubsetOrder(EpochOrder(3, seed=0, stream="s"), np.array([7, 1, 5]))
    assert sorted(order[n].index for n in range(3)) == [1, 5, 7] == sorted(order[n].index for n in range(3, 6))


@settings(max_examples=6, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 900), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_mixture_follows_every_set_in_full_and_by_its_weight(weights: list[float], sizes: list[int], seed: int):
    orders = [EpochOrder(size, seed=seed, stream=f"s/{i}") for i, size in enumerate(sizes[: len(weights)])]
    mixture = MixedOrder(orders, weights, seed=seed, stream="source")
    draws = [mixture[n] for n in range(10_000, 20_000)]
    for part, weight in enumerate(weights):
        drawn = [draw.index for draw in draws if draw.part == part]
        assert len(drawn) == mixture.shares[part]
        assert len(drawn) / 10_000 == pytest.approx(weight / sum(weights), abs=1e-4)
        expected = [orders[part][n].index for n in range(len(drawn), 2 * len(drawn))]
        assert sorted(drawn) == sorted(expected), "the set's own order, each of its numbers once"


def test_a_mixture_is_spread_evenly_and_differs_by_block() -> None:
    orders = [EpochOrder(10, seed=0, stream=name) for name in ("a", "b")]
    mixture = MixedOrder(orders, [3, 1], seed=0, stream="source")
    parts = [mixture[n].part for n in range(20_000)]
    assert all(150 < sum(parts[i : i + 1000]) < 350 for i in range(0, 20_000, 1000))
    assert parts[:10_000] != parts[10_000:]


def test_a_set_with_no_share_is_refused() -> None:
    orders = [EpochOrder(10, seed=0, stream=name) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"data.source: weights \[1, 1e-06\] give a set less than one of 10,000"):
        MixedOrder(orders, [1, 1e-6], seed=0, stream="source")
