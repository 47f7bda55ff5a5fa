"""Schedule, noising and sampling, against diffusers' scheduler and as inverses."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.diffusion import (
    add_noise,
    ddim_step,
    noise_from_velocity,
    noise_from_z_0,
    sample,
    scaled_linear_alpha_bar,
    trailing_timesteps,
    velocity_of,
    z_0_from_velocity,
)
from iccld.solver import Solver

ALPHA_BAR = scaled_linear_alpha_bar()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


def denoise(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Any smooth function will do: the samplers must agree on it."""
    return torch.tanh(z_t * (1.0 + t.float().view(-1, 1, 1, 1) / 1000.0)) + 0.1


def z_0_from_noise(z_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Solve `add_noise` for z_0."""
    signal = alpha_bar[t].view(-1, 1, 1, 1)
    return (z_t - (1.0 - signal).sqrt() * noise) / signal.sqrt()


def random_latents(seed: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def test_schedule_equals_diffusers_and_falls():
    torch.testing.assert_close(ALPHA_BAR, scheduler().alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert ALPHA_BAR.shape == (1000,) and ALPHA_BAR.dtype == torch.float32
    assert bool((ALPHA_BAR.diff() < 0).all()) and 0 < float(ALPHA_BAR[-1]) < float(ALPHA_BAR[0]) < 1


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 50])
def test_sampling_equals_diffusers(num_steps: int):
    reference, noise = scheduler(), random_latents(0)
    reference.set_timesteps(num_steps)
    assert trailing_timesteps(num_steps) == reference.timesteps.tolist()
    z_t = noise
    for t in reference.timesteps:
        z_t = reference.step(denoise(z_t, t.expand(len(z_t))), int(t), z_t, eta=0.0).prev_sample
    got = sample(lambda z_t, t: z_0_from_noise(z_t, denoise(z_t, t), t, ALPHA_BAR), noise, ALPHA_BAR, num_steps)
    torch.testing.assert_close(got, z_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 50])
def test_sampling_of_second_order_equals_diffusers(num_steps: int):
    reference, noise = (
        DPMSolverMultistepScheduler.from_config(scheduler().config, final_sigmas_type="zero"),
        random_latents(0),
    )
    reference.set_timesteps(num_steps)
    z_t = noise
    for t in reference.timesteps:
        z_t = reference.step(denoise(z_t, t.expand(len(z_t))), int(t), z_t).prev_sample

    def z_0_pred(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return z_0_from_noise(z_t, denoise(z_t, t), t, ALPHA_BAR)

    assert reference.timesteps.tolist() == trailing_timesteps(num_steps)
    got = sample(z_0_pred, noise, ALPHA_BAR, num_steps, solver=Solver.dpm)
    torch.testing.assert_close(got, z_t, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("start", "num_steps", "seen"), [(0.5, 2, [499, 249]), (0.001, 2, [1, 0]), (1.0, 2, [999, 499])]
)
def test_a_later_start_noises_the_guess_of_its_timestep(start: float, num_steps: int, seen: list[int]):
    z_0, noise, timesteps, first = random_latents(2), random_latents(3), list[int](), list[torch.Tensor]()

    def perfect(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        timesteps.append(int(t[0]))
        first.append(z_t)
        return z_0

    guess = None if start == 1.0 else z_0
    assert torch.equal(sample(perfect, noise, ALPHA_BAR, num_steps, guess=guess, start=start), z_0)
    assert timesteps == seen
    expected = noise if guess is None else add_noise(z_0, noise, torch.tensor(seen[:1] * 2), ALPHA_BAR)
    assert torch.equal(first[0], expected)


@given(num_steps=st.integers(1, 1000))
def test_timesteps_start_at_the_noisiest_and_fall(num_steps: int):
    steps = trailing_timesteps(num_steps)
    assert len(steps) == num_steps and steps[0] == 999 and steps[-1] >= 0
    assert all(later < earlier for earlier, later in pairwise(steps))


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), t=st.integers(0, 999))
def test_noising_is_undone_by_either_prediction(seed: int, t: int):
    z_0, noise, steps = random_latents(seed).double(), random_latents(seed + 1).double(), torch.full((2,), t)
    z_t = add_noise(z_0, noise, steps, ALPHA_BAR.double())
    torch.testing.assert_close(z_0_from_noise(z_t, noise, steps, ALPHA_BAR.double()), z_0)
    torch.testing.assert_close(noise_from_z_0(z_t, z_0, steps, ALPHA_BAR.double()), noise)


def test_each_sample_is_noised_by_its_own_timestep():
    z_0, noise, t = random_latents(0), random_latents(1), torch.tensor([3, 900])
    z_t = add_noise(z_0, noise, t, ALPHA_BAR)
    for i in range(2):
        alone = add_noise(z_0[i : i + 1], noise[i : i + 1], t[i : i + 1], ALPHA_BAR)
        assert torch.equal(z_t[i : i + 1], alone)
        expected = ALPHA_BAR[t[i]].sqrt() * z_0[i] + (1 - ALPHA_BAR[t[i]]).sqrt() * noise[i]
        torch.testing.assert_close(z_t[i], expected)


@settings(deadline=None, max_examples=20)
@given(num_steps=st.integers(1, 60))
def test_perfect_prediction_recovers_z_0_in_any_number_of_steps(num_steps: int):
    z_0, noise = random_latents(2).double(), random_latents(3).double()
    alpha_bar = ALPHA_BAR.double()
    start = add_noise(z_0, noise, torch.full((2,), 999), alpha_bar)
    seen = []

    def perfect(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(noise_from_z_0(z_t, z_0, t, alpha_bar))
        return z_0

    torch.testing.assert_close(sample(perfect, start, alpha_bar, num_steps), z_0)
    torch.testing.assert_close(seen, [noise] * num_steps)


def test_the_last_step_returns_the_clean_latent():
    z_t, noise, t = random_latents(4), random_latents(5), torch.tensor([19, 19])
    z_0 = z_0_from_noise(z_t, noise, t, ALPHA_BAR)
    assert torch.equal(ddim_step(z_t, z_0, t, None, ALPHA_BAR), z_0)


def test_sampling_lets_the_gradient_through():
    scale = torch.tensor(0.3, requires_grad=True)
    sample(lambda z_t, t: scale * z_t, random_latents(6), ALPHA_BAR, 4).square().sum().backward()
    assert scale.grad is not None and float(scale.grad.abs()) > 0


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(num_steps: int):
    with pytest.raises(ValueError, match=rf"num_steps={num_steps} .*between 1 and 1000"):
        sample(denoise, random_latents(0), ALPHA_BAR, num_steps)


def test_the_noise_of_the_true_velocity_is_the_true_noise():
    alpha_bar = scaled_linear_alpha_bar()
    t = torch.tensor([0, 250, 999])
    z_0, noise = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    signal_scale, noise_scale = (scale.view(-1, 1, 1, 1) for scale in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))
    velocity = signal_scale * noise - noise_scale * z_0
    z_t = add_noise(z_0, noise, t, alpha_bar)
    torch.testing.assert_close(velocity_of(z_0, noise, t, alpha_bar), velocity)
    torch.testing.assert_close(noise_from_velocity(z_t, velocity, t, alpha_bar), noise)
    torch.testing.assert_close(z_0_from_velocity(z_t, velocity, t, alpha_bar), z_0)


@pytest.mark.parametrize("t", [0, 400, 999])
def test_the_squared_errors_of_noise_velocity_and_z_0_differ_by_known_factors(t: int):
    z_0, noise, velocity, other = (random_latents(seed).double() for seed in range(4))
    steps, alpha_bar = torch.full((2,), t), ALPHA_BAR.double()
    z_t = add_noise(z_0, noise, steps, alpha_bar)
    error = (velocity - other).square().mean()
    of_noise = noise_from_velocity(z_t, velocity, steps, alpha_bar) - noise_from_velocity(z_t, other, steps, alpha_bar)
    of_z_0 = z_0_from_velocity(z_t, velocity, steps, alpha_bar) - z_0_from_velocity(z_t, other, steps, alpha_bar)
    torch.testing.assert_close(of_noise.square().mean(), alpha_bar[t] * error)
    torch.testing.assert_close(of_z_0.square().mean(), (1 - alpha_bar[t]) * error)


def test_half_precision_velocity_gives_z_0_where_half_precision_noise_does_not():
    """An error of the noise is magnified 14 times at the last timestep; one of the velocity is not."""
    z_0, noise, t = random_latents(0), random_latents(1), torch.full((2,), 999)
    z_t = add_noise(z_0, noise, t, ALPHA_BAR)
    velocity = velocity_of(z_0, noise, t, ALPHA_BAR)
    from_velocity = z_0_from_velocity(z_t, velocity.bfloat16().float(), t, ALPHA_BAR)
    from_noise = z_0_from_noise(z_t, noise.bfloat16().float(), t, ALPHA_BAR)
    assert 5 * (from_velocity - z_0).abs().max() < (from_noise - z_0).abs().max()
