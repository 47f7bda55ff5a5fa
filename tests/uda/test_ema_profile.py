"""Power-function averages against slow sums, numerical integration, and each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.uda.ema_profile import (
    PowerAverages,
    Profile,
    decay,
    exponent,
    inner_products,
    profile_error,
    snapshot_weights,
)
from iccld.uda.settings import MAX_WIDTH, EmaProfileConfig, average_name

WIDTHS = st.floats(0.005, MAX_WIDTH)
STEPS = st.integers(1, 100_000)
PROFILES = st.builds(Profile, STEPS, WIDTHS)
NODES, SHARES = np.polynomial.legendre.leggauss(300)  # exact to degree 599; a product has 2 * 198 at the width 0.005


def step_weights(step: int, width: float) -> np.ndarray:
    """The share of each of the first `step` students: the integral of the profile over the step's unit of time."""
    edges = (np.arange(step + 1) / step) ** (exponent(width) + 1)
    return np.diff(edges)


def grid(*, last: int, every: int, widths: tuple[float, ...] = (0.05, 0.10)) -> list[Profile]:
    return [Profile(step, width) for step in range(every, last + 1, every) for width in widths]


def smooth_walk(num_steps: int, *, seed: int, size: int = 8) -> np.ndarray:
    """`(num_steps, size)`: an integrated random walk of slowly turning velocity, as weights under momentum move."""
    velocity = np.zeros(size)
    walk = []
    for noise in np.random.default_rng(seed).normal(size=(num_steps, size)):
        velocity = 0.95 * velocity + noise
        walk.append(velocity)
    return np.cumsum(walk, axis=0)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_of_the_paper(width: float, gamma: float):
    assert exponent(width) == pytest.approx(gamma, abs=0.005)


def relative_width(gamma: float) -> float:
    """Invert `exponent`."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


@given(WIDTHS)
def test_width_to_exponent_and_back(width: float):
    assert relative_width(exponent(width)) == pytest.approx(width, rel=1e-6)


@given(st.floats(0, 500))
def test_the_width_is_the_standard_deviation_of_the_profile(gamma: float):
    middles = (np.arange(200_000) + 0.5) / 200_000
    profile = (gamma + 1) * middles**gamma
    mean = (profile * middles).mean()
    assert relative_width(gamma) == pytest.approx(np.sqrt((profile * (middles - mean) ** 2).mean()), rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(PROFILES, PROFILES)
def test_the_inner_product_equals_numerical_integration(first: Profile, second: Profile):
    # Gauss-Legendre on the common support; in logarithms, as t^gamma alone overflows.
    end = min(first.step, second.step)
    tau, shares = (NODES + 1) / 2 * end, SHARES / 2 * end
    logs = np.zeros_like(tau)
    for step, width in (first, second):
        gamma = exponent(width)
        logs += np.log(gamma + 1) + gamma * np.log(tau) - (gamma + 1) * np.log(step)
    [[product]] = inner_products([first], [second])
    assert product == pytest.approx((shares * np.exp(logs)).sum(), rel=1e-6, abs=1e-300)
    assert product == inner_products([second], [first])[0, 0]


def test_the_inner_product_of_late_narrow_profiles_is_finite():
    narrow = [Profile(10, 0.002), Profile(10**8, 0.002)]
    products = inner_products(narrow, narrow)
    assert np.isfinite(products).all() and (np.diag(products) > 0).all()


@settings(max_examples=30, deadline=None)
@given(WIDTHS, st.integers(1, 60), st.integers(0, 1000))
def test_updates_equal_the_slow_weighted_sum(width: float, num_steps: int, seed: int):
    students = torch.randn(num_steps, 3, 2, generator=torch.Generator().manual_seed(seed))
    averages = PowerAverages({"w": torch.zeros(3, 2)}, [width])
    for step, student in enumerate(students):
        averages.update({"w": student}, step)
        assert step or torch.equal(averages.state_dict()[f"{average_name(width)}/w"], student)
    slow = (torch.from_numpy(step_weights(num_steps, width)).view(-1, 1, 1) * students.double()).sum(dim=0)
    torch.testing.assert_close(averages.state_dict()[f"{average_name(width)}/w"].double(), slow, rtol=1e-5, atol=1e-5)


def test_averages_are_fp32_and_do_not_share_memory_with_a_student_of_any_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        student = {"w": torch.ones(4, dtype=dtype)}
        averages = PowerAverages(student, [0.05, 0.10])
        averages.update(student, 0)
        student["w"].zero_()
        state = averages.state_dict()
        assert list(state) == ["ema_0.050/w", "ema_0.100/w"]
        assert all(t.dtype == torch.float32 and bool((t == 1).all()) for t in state.values())


@given(WIDTHS, st.integers(1, 10_000))
def test_decay_is_the_papers_beta(width: float, step: int):
    gamma = exponent(width)
    assert decay(0, gamma=gamma) == 0
    assert decay(step, gamma=gamma) == pytest.approx((1 - 1 / (step + 1)) ** (gamma + 1))


def test_a_resume_in_the_middle_is_bitwise():
    students = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    whole = PowerAverages({"w": students[0]}, [0.05, 0.10])
    for step in range(40):
        whole.update({"w": students[step]}, step)
        if step == 24:
            kept = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    resumed = PowerAverages({"w": torch.full((5,), torch.nan)}, [0.05, 0.10])
    for name, tensor in resumed.state_dict().items():  # as the engine fills it
        tensor.copy_(kept[name])
    for step in range(25, 40):
        resumed.update({"w": students[step]}, step)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 500), st.data())
def test_a_tracked_profile_is_its_own_snapshot(count: int, every: int, data: st.DataObject):
    profiles = grid(last=count * every, every=every)
    wanted = data.draw(st.sampled_from(profiles))
    weights = snapshot_weights(profiles, wanted)
    assert weights.tolist() == [float(profile == wanted) for profile in profiles]
    assert profile_error(profiles, weights, wanted) < 1e-7


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.sampled_from([0.05, 0.10]), st.sampled_from([1e-9, -1e-9]))
def test_the_solution_tends_to_the_snapshot_as_the_wanted_profile_does(count: int, width: float, nudge: float):
    """The unchanged snapshot that is returned is what would be solved."""
    profiles = grid(last=count * 100, every=100)
    weights = snapshot_weights(profiles, Profile(count * 100, width + nudge))
    np.testing.assert_allclose(weights, [float(p == (count * 100, width)) for p in profiles], atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), WIDTHS)
def test_no_other_weights_of_sum_1_are_nearer(count: int, width: float):
    profiles, wanted = grid(last=count * 100, every=100), Profile(count * 100, width)
    weights = snapshot_weights(profiles, wanted)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    gram, cross = inner_products(profiles, profiles), inner_products(profiles, [wanted])[:, 0]
    gradient = gram @ weights - cross  # equal in all directions but that of the sum
    assert np.ptp(gradient) <= 1e-8 * abs(cross).max()


def test_with_enough_snapshots_the_weights_are_the_papers():
    """Least squares without the constraint: the sum comes out as 1 to the accuracy of the fit."""
    profiles, wanted = grid(last=6400, every=100), Profile(6400, 0.07)
    gram, cross = inner_products(profiles, profiles), inner_products(profiles, [wanted])[:, 0]
    free = np.linalg.solve(gram, cross)
    np.testing.assert_allclose(snapshot_weights(profiles, wanted), free, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), WIDTHS, st.integers(1, 12), st.integers(3, 40))
def test_the_reconstruction_is_as_near_as_the_profiles_are(seed: int, width: float, count: int, every: int):
    """Cauchy-Schwarz, for any trajectory: the error is at most the profiles' distance times the trajectory's norm.

    The weights sum to 1, so the norm may be taken about any constant; 1e-6 of the largest weight is left to rounding.
    """
    last = count * every
    walk = smooth_walk(last, seed=seed)
    profiles, wanted = grid(last=last, every=every), Profile(last, width)
    weights = snapshot_weights(profiles, wanted)
    snapshots = np.stack([step_weights(*profile) @ walk[: profile.step] for profile in profiles])
    error = abs(weights @ snapshots - step_weights(*wanted) @ walk)
    distance = profile_error(profiles, weights, wanted) * np.sqrt(inner_products([wanted], [wanted])[0, 0])
    assert (error <= distance * np.linalg.norm(walk - walk.mean(axis=0), axis=0) + 1e-6 * abs(walk).max()).all()


@pytest.mark.parametrize("width", [0.02, 0.03, 0.07, 0.15, 0.20])
def test_an_untracked_width_agrees_with_an_average_of_that_width(width: float):
    """Over 64 snapshots of widths 0.05 and 0.10; the error is relative to the trajectory's spread about its mean.

    The tolerance is a tenth of the profiles' distance (1 % for 0.02, 0.3 % for 0.03, less for the others): the
    combined profile crosses the wanted one time and again, and a smooth trajectory averages that out.
    """
    num_steps, every = 1280, 20
    walk = torch.from_numpy(smooth_walk(num_steps, seed=3, size=64)).float()
    tracked, direct = PowerAverages({"w": walk[0]}, [0.05, 0.10]), PowerAverages({"w": walk[0]}, [width])
    snapshots: list[torch.Tensor] = []
    for step in range(num_steps):
        tracked.update({"w": walk[step]}, step)
        direct.update({"w": walk[step]}, step)
        if (step + 1) % every == 0:
            snapshots += [tensor.clone() for tensor in tracked.state_dict().values()]
    profiles, wanted = grid(last=num_steps, every=every), Profile(num_steps, width)
    weights = snapshot_weights(profiles, wanted)
    distance = profile_error(profiles, weights, wanted)
    assert distance < 0.02
    rebuilt = (torch.from_numpy(weights)[:, None] * torch.stack(snapshots).double()).sum(dim=0)
    spread = walk.double().std(dim=0)
    error = (rebuilt - direct.state_dict()[f"{average_name(width)}/w"].double()).abs() / spread
    assert error.max() < distance / 10


def test_a_weight_that_never_moved_comes_back_from_one_snapshot():
    weights = snapshot_weights(grid(last=100, every=100), Profile(100, 0.2))
    assert (weights * 5.0).sum() == pytest.approx(5.0, abs=1e-9)


@pytest.mark.parametrize(
    ("widths", "every", "words"),
    [
        ([0.05, 0.0], 100, "ema_profile.widths=[0.05, 0.0] must be between 0 and 0.2886"),
        ([0.3], 100, "ema_profile.widths=[0.3] must be between 0 and 0.2886"),
        ([float("nan")], 100, "ema_profile.widths=[nan] must be between"),
        ([0.05, 0.0501], 100, "must differ in their first three decimals; use [0.05, 0.10]"),
        ([0.05], 0, "ema_profile.snapshot_every=0 with ema_profile.widths=[0.05] must be a positive number"),
        ([0.05], -5, "ema_profile.snapshot_every=-5"),
        ([], 100, "ema_profile.snapshot_every=100 with ema_profile.widths=[] must be a positive number of steps if"),
    ],
)
def test_a_wrong_setting_is_named(widths: list[float], every: int, words: str):
    with pytest.raises(ValueError, match=r"^ema_profile") as error:
        EmaProfileConfig(widths=widths, snapshot_every=every)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_right_settings_are_taken():
    assert not EmaProfileConfig().widths and EmaProfileConfig(widths=[0.05, 0.10], snapshot_every=100)


def test_parameters_of_another_model_are_refused():
    averages = PowerAverages({"w": torch.zeros(3)}, [0.05])
    before = averages.state_dict()["ema_0.050/w"].clone()
    with pytest.raises(ValueError, match=r"the parameters lack 1 averages \(w\) and have 2 unknown ones \(a, b\)"):
        averages.update({"a": torch.ones(3), "b": torch.ones(3)}, 0)
    assert torch.equal(averages.state_dict()["ema_0.050/w"], before)
