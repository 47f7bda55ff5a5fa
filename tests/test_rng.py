"""Draws depend on seed, purpose and number, and on nothing else."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld import rng

NUMBERS = st.lists(st.integers(0, 10**12), min_size=1, max_size=5)


def normal(numbers, shape=(2, 3), seed=0, purpose="noise"):
    return rng.normal(shape, seed=seed, purpose=purpose, numbers=torch.tensor(numbers), device="cpu")


def test_keys_differ_by_seed_purpose_number_and_count_of_numbers():
    keys = [
        rng.key(seed, purpose, *numbers)
        for seed in (0, 1, 11)
        for purpose in ("noise", "crop")
        for numbers in [(), (0,), (1,), (11,), (1, 1), (0, 1), (1, 0)]
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)


def test_keys_are_the_same_in_every_process_and_release():
    # A changed key changes every draw of every run that is to be resumed.
    assert rng.key(0, "noise", 5) == rng.key(0, "noise", np.int64(5)) == 6234166739501455009


def test_keys_spread_over_all_bits():
    bits = np.array([[rng.key(0, "noise", n) >> bit & 1 for bit in range(63)] for n in range(2000)])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.06


@given(NUMBERS, st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_sample_draws_alike_in_every_batch(numbers, cut):
    parts = [part for part in (numbers[:cut], numbers[cut:]) if part]
    assert torch.equal(normal(numbers), torch.cat([normal(part) for part in parts]))

    def uniform(numbers):
        return rng.uniform(4, seed=0, purpose="t", numbers=torch.tensor(numbers))

    assert torch.equal(uniform(numbers), torch.cat([uniform(part) for part in parts]))


def draws():
    return (
        normal([3, 5]).tolist(),
        rng.uniform(3, seed=0, purpose="t", numbers=torch.tensor([1])).tolist(),
        rng.numpy_generator(0, "crop", 7).integers(0, 2**31, 4).tolist(),
        torch.rand(3, generator=rng.torch_generator(0, "mix", 7)).tolist(),
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_global_seeds_neither_matter_nor_change(seed):
    expected = draws()
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert draws() == expected
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_shapes_dtypes_and_ranges():
    noise = normal([0, 1, 2])
    assert noise.shape == (3, 2, 3) and noise.dtype == torch.float32
    draw = rng.uniform(1000, seed=0, purpose="t", numbers=torch.tensor([0, 1]))
    assert draw.shape == (2, 1000) and draw.dtype == torch.float64
    assert draw.min() >= 0 and draw.max() < 1


def test_moments_within_and_across_samples():
    within = normal(list(range(8)), (50, 50)).double()
    assert abs(within.mean()) < 0.03 and abs(within.std() - 1) < 0.03
    across = normal(list(range(4000)), (3,)).double()
    assert across.mean(0).abs().max() < 0.07 and (across.std(0) - 1).abs().max() < 0.07
    neighbours = torch.corrcoef(torch.stack([across[:-1, 0], across[1:, 0]]))[0, 1]
    assert abs(neighbours) < 0.07
    uniform = rng.uniform(1, seed=3, purpose="t", numbers=torch.arange(4000))
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.005


def test_purposes_and_seeds_are_uncorrelated():
    draws = [normal([0], (4000,), *key)[0] for key in ((0, "noise"), (1, "noise"), (0, "mix"))]
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(3)).abs().max() < 0.06
