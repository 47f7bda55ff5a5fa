"""Diffusion's arithmetic: schedule, noising and deterministic sampling. Tensors in, tensors out.

`B` samples, `C h w` latent, `T` diffusion steps. `z_0`, `z_t` and `noise` are `(B, C, h, w)` floats, `t` is `(B,)`
int64 in [0, T-1], `alpha_bar` is `(T,)` float32 in (0, 1) and falls with t.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from iccld.solver import Solver

NUM_TRAIN_STEPS = 1000
FIRST_BETA, LAST_BETA = 0.00085, 0.012


def scaled_linear_alpha_bar() -> Tensor:
    """Return the products of 1 - beta, `(T,)` float32; sqrt(beta) rises linearly (the schedule of latent diffusion)."""
    betas = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, NUM_TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0).float()


def _scales(t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each `(B, 1, 1, 1)`."""
    selected = alpha_bar[t].view(-1, 1, 1, 1)
    return selected.sqrt(), (1.0 - selected).sqrt()


def add_noise(z_0: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) noise (DDPM, equation 4)."""
    signal_scale, noise_scale = _scales(t, alpha_bar)
    return signal_scale * z_0 + noise_scale * noise


def noise_from_z_0(z_t: Tensor, z_0: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the noise that a clean latent implies: `add_noise` solved for the noise."""
    signal_scale, noise_scale = _scales(t, alpha_bar)
    return (z_t - signal_scale * z_0) / noise_scale


def noise_from_velocity(z_t: Tensor, velocity: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the noise that a velocity v implies, v being that of `velocity_of` (Salimans & Ho 2022).

    An error in v is never magnified, neither here nor in `z_0_from_velocity`.
    """
    signal_scale, noise_scale = _scales(t, alpha_bar)
    return noise_scale * z_t + signal_scale * velocity


def z_0_from_velocity(z_t: Tensor, velocity: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the clean latent that a velocity implies, sqrt(alpha_bar_t) z_t - sqrt(1 - alpha_bar_t) v."""
    signal_scale, noise_scale = _scales(t, alpha_bar)
    return signal_scale * z_t - noise_scale * velocity


def velocity_of(z_0: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) z_0 (Salimans & Ho 2022).

    Its squared error is that of the noise over alpha_bar_t, and that of z_0 over 1 - alpha_bar_t.
    """
    signal_scale, noise_scale = _scales(t, alpha_bar)
    return signal_scale * noise - noise_scale * z_0


def trailing_timesteps(num_steps: int, *, num_train_steps: int = NUM_TRAIN_STEPS) -> list[int]:
    """Return `num_steps` timesteps from T-1 downwards, evenly spaced and ending one stride above z_0.

    The first is always T-1, where z_t is (nearly) pure noise: with "leading" spacing few-step sampling starts at a
    timestep that never saw pure noise, and fails.
    """
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(
            f"num_steps={num_steps} (sampling) must be between 1 and {num_train_steps}; 1 to 50 are usual."
        )
    return [round(num_train_steps * i / num_steps) - 1 for i in range(num_steps, 0, -1)]


def ddim_step(z_t: Tensor, z_0_pred: Tensor, t: Tensor, t_next: Tensor | None, alpha_bar: Tensor) -> Tensor:
    """Take one deterministic step from t to the smaller `t_next` (DDIM, equation 12 with eta = 0); None: to z_0.

    The noise is the one that z_0 implies. Were z_0 derived from the noise, it would have the noise's error 14 times
    near pure noise.
    """
    if t_next is None:
        return z_0_pred
    return add_noise(z_0_pred, noise_from_z_0(z_t, z_0_pred, t, alpha_bar), t_next, alpha_bar)


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    alpha_bar: Tensor,
    num_steps: int,
    *,
    solver: Solver = Solver.ddim,
    guess: Tensor | None = None,
    start: float = 1.0,
) -> Tensor:
    """Follow `denoise(z_t, t) -> z_0_pred` from `noise` `(B, C, h, w)` in `num_steps` steps; return z_0.

    guess: of z_0, `(B, C, h, w)`: sampling begins from it with noise, at the share `start` of the diffusion's steps;
    None: from the noise alone. With more steps than are left there, it begins earlier.
    """
    last = len(alpha_bar) if guess is None else max(num_steps, round(start * len(alpha_bar)))
    steps = trailing_timesteps(num_steps, num_train_steps=last)
    timesteps = [noise.new_full((noise.shape[0],), t, dtype=torch.int64) for t in steps]
    z_t = noise if guess is None else add_noise(guess, noise, timesteps[0], alpha_bar)
    predictions: list[Tensor] = []
    for i, t in enumerate(timesteps):
        t_next = timesteps[i + 1] if i + 1 < len(timesteps) else None
        predictions = [*predictions[-1:], denoise(z_t, t)]
        z_0_pred = predictions[-1]
        if solver is Solver.dpm and len(predictions) == 2 and t_next is not None:
            z_0_pred = _extrapolated(predictions, (timesteps[i - 1], t, t_next), alpha_bar)
        z_t = ddim_step(z_t, z_0_pred, t, t_next, alpha_bar)
    return z_t


def _extrapolated(predictions: list[Tensor], timesteps: tuple[Tensor, Tensor, Tensor], alpha_bar: Tensor) -> Tensor:
    """Return the z_0 with which a DDIM step is one of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    predictions: of z_0 at the first two of the timesteps, the one before and the present; the third is the next.
    """
    half_log_ratios = [torch.log(signal / noise) for signal, noise in (_scales(t, alpha_bar) for t in timesteps)]
    before, ahead = (b - a for a, b in pairwise(half_log_ratios))
    return predictions[1] + ahead / (2 * before) * (predictions[1] - predictions[0])
