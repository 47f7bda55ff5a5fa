"""Input of the denoiser of stage 2, and the error by which it learns. `C h w` latent, `T` diffusion steps."""

from typing import NamedTuple

import torch
from torch import Tensor

from iccld import rng
from iccld.diffusion import add_noise, velocity_of
from iccld.losses import latent_mse
from iccld.models.denoiser import DenoiserOutput
from iccld.stages.settings import DiffusionLoss


class Noised(NamedTuple):
    """Noised latent z_t and its noise `(B, C, h, w)`; t `(B,)` int64; `is_pure` `(B,)` bool: z_t holds no z_0."""

    z_t: Tensor
    t: Tensor
    noise: Tensor
    is_pure: Tensor


def draw_timesteps(draws: Tensor, pure_draws: Tensor, *, pure_noise_share: float, num_train_steps: int) -> Tensor:
    """Draw timesteps on the host, `(B,)` int64: uniform in [0, T-1], or T for a sample that is pure noise.

    draws, pure_draws: `(B,)` in [0, 1). One tensor tells both, so that one is sent to the device.
    """
    return (draws * num_train_steps).long().masked_fill(pure_draws < pure_noise_share, num_train_steps)


def noised(z_0: Tensor, noise: Tensor, timesteps: Tensor, alpha_bar: Tensor) -> Noised:
    """Add the noise by the timesteps of `draw_timesteps`; for T, z_t is the noise itself, at T-1.

    The sampler starts from there, too, whereas z_t at T-1 still has sqrt(alpha_bar_T-1) = 0.068 of z_0.
    """
    timesteps, last = rng.to_device(timesteps, z_0.device), len(alpha_bar) - 1
    is_pure, t = timesteps > last, timesteps.clamp(max=last)
    z_t = torch.where(is_pure.view(-1, 1, 1, 1), noise, add_noise(z_0, noise, t, alpha_bar))
    return Noised(z_t, t, noise, is_pure)


def without_noise(z_0: Tensor, alpha_bar: Tensor) -> Noised:
    """Return the deterministic control's input: z_t = 0 and t = T-1, whatever z_0 is."""
    zeros = torch.zeros_like(z_0)
    t = torch.full((len(z_0),), len(alpha_bar) - 1, dtype=torch.int64, device=z_0.device)
    return Noised(zeros, t, zeros, torch.ones_like(t, dtype=torch.bool))


def denoising_errors(
    prediction: DenoiserOutput, z_0: Tensor, given: Noised, alpha_bar: Tensor, *, loss: DiffusionLoss
) -> Tensor:
    """Return the squared error of each sample, `(B,)` float32; where z_t is pure noise, that of z_0.

    The noise's error would teach z_0 = 0 there: z_t is the noise, and z_0 is not in it.
    """
    if loss is DiffusionLoss.noise:
        errors = latent_mse(prediction.noise_pred, given.noise)
    else:
        errors = latent_mse(prediction.velocity, velocity_of(z_0, given.noise, given.t, alpha_bar))
    return torch.where(given.is_pure, latent_mse(prediction.z_0_pred, z_0), errors)
