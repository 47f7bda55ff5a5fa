"""Target-like corruption of labelled images. `B C H W` images in [0, 1]; a sample is corrupted by its own draws alone.

In order: the low frequencies' amplitude becomes the target's in part (FDA: Yang & Soatto 2020, arXiv 2004.05498), then
colour jitter and blur, sensor noise, grey blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iccld import rng
from iccld.uda.masking import block_mask
from iccld.uda.photometric import NUM_DRAWS, strong_augment
from iccld.uda.settings import CorruptionConfig

NUM_SHARES = 3
"""Draws of a sample beside those of the photometric part and the blocks: amplitude, band, noise."""
GREY = 0.5


class CorruptionDraws(NamedTuple):
    """Draws of a batch: `uniform` `(B, n)` in [0, 1) on the host; `noise` `(B, 3, H, W)` standard normal.

    The noise is on the images' device.
    """

    uniform: Tensor
    noise: Tensor


def draw_corruption(
    config: CorruptionConfig, *, noise: Tensor, seed: int, purpose: str, numbers: Tensor
) -> CorruptionDraws:
    """Draw for images of the size of `noise` `(B, 3, H, W)`, keyed by sample."""
    rows, columns = _blocks(noise.shape[-2:], config)
    count = NUM_SHARES + NUM_DRAWS + rows * columns
    return CorruptionDraws(rng.uniform(count, seed=seed, purpose=purpose, numbers=numbers), noise)


def corrupt(images: Tensor, target_images: Tensor, draws: CorruptionDraws, config: CorruptionConfig) -> Tensor:
    """Make labelled images look more like the target's; labels stay as they are, also under a grey block.

    images, target_images: `(B, 3, H, W)` float32 in [0, 1]; image i takes its amplitude from target image i.
    Returns the images' shape and range; at strength 0 the images themselves.
    """
    if config.strength == 0.0:
        return images
    uniform = rng.to_device(draws.uniform.float(), images.device)
    amplitude, band, deviation = uniform[:, :NUM_SHARES, None, None, None].unbind(dim=1)
    images = mix_amplitude(
        images, target_images, share=config.strength * amplitude, band=config.strength * config.fourier_band * band
    )
    images = strong_augment(images, draws.uniform[:, NUM_SHARES : NUM_SHARES + NUM_DRAWS], config.photometric())
    images = images + config.strength * config.noise * deviation * draws.noise
    blocks = uniform[:, NUM_SHARES + NUM_DRAWS :].unflatten(1, _blocks(images.shape[-2:], config))
    height, width = images.shape[-2:]
    visible = block_mask(blocks, height=height, width=width, ratio=config.strength * config.block_ratio)
    return torch.where(visible > 0, images, GREY).clamp(0, 1)


def mix_amplitude(images: Tensor, others: Tensor, *, share: Tensor, band: Tensor) -> Tensor:
    """Move the amplitude of low frequencies by `share` towards that of `others`; phases stay.

    images, others: `(B, C, H, W)` float32. share, band: `(B, 1, 1, 1)`; `band` is the half width of the square of low
    frequencies as a share of the shorter side, and 0 is the mean colour alone. Not clamped to [0, 1].
    """
    height, width = images.shape[-2:]
    own, other = torch.fft.rfft2(images.float()), torch.fft.rfft2(others.float())
    rows = torch.fft.fftfreq(height, d=1 / height, device=images.device).abs()
    columns = torch.fft.rfftfreq(width, d=1 / width, device=images.device)
    low = torch.maximum(rows[:, None], columns) <= band * min(height, width)
    amplitude = own.abs() + share * low * (other.abs() - own.abs())
    return torch.fft.irfft2(torch.polar(amplitude, own.angle()), s=(height, width))


def _blocks(size: Sequence[int], config: CorruptionConfig) -> tuple[int, int]:
    return -(-size[0] // config.block), -(-size[1] // config.block)
