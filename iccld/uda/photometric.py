"""Strong photometric augmentation, in batch on the device, with keyed draws a sample. `B C H W` images in [0, 1]."""

from contextlib import nullcontext

import torch
from torch import Tensor

from iccld import rng
from iccld.uda.settings import PhotometricConfig

NUM_DRAWS = 7
_REACH = 3.5  # of the blur's kernel to each side, in standard deviations of the strongest blur
_LEAST_REACH = 4  # pixels


def strong_augment(images: Tensor, draws: Tensor, config: PhotometricConfig) -> Tensor:
    """Jitter brightness, contrast, saturation and hue, then blur; each with its probability.

    images: `(B, 3, H, W)` float in [0, 1]; draws: `(B, 7)` in [0, 1), on the host.
    Returns the images' shape and range.
    """
    # Slow to import; only where images are augmented.
    from kornia.enhance import adjust_brightness_accumulative, adjust_contrast_with_mean_subtraction, adjust_hue
    from kornia.enhance import adjust_saturation_with_gray_subtraction as adjust_saturation
    from kornia.filters import gaussian_blur2d

    draws = draws.float()
    # Kornia reads sigma to check it: on the device, the host would wait there for all that is queued.
    sigma = config.blur_sigma_min + draws[:, 6:7] * (config.blur_sigma_max - config.blur_sigma_min)
    reach = max(_LEAST_REACH, round(_REACH * config.blur_sigma_max))
    kernel = 2 * min(reach, *(side - 1 for side in images.shape[-2:])) + 1  # the border is mirrored
    draws = rng.to_device(draws, images.device)
    spread = (2 * draws[:, 1:5] - 1) * config.jitter
    jittered = adjust_brightness_accumulative(images, 1 + spread[:, 0])
    jittered = adjust_contrast_with_mean_subtraction(jittered, 1 + spread[:, 1])
    jittered = adjust_saturation(jittered, 1 + spread[:, 2])
    jittered = adjust_hue(jittered, 2 * torch.pi * spread[:, 3])
    images = torch.where((draws[:, 0] < config.jitter_probability).view(-1, 1, 1, 1), jittered, images)
    # Its convolutions would round images to bf16. On meta, where only shapes matter, there is no autocast.
    with nullcontext() if images.is_meta else torch.autocast(images.device.type, enabled=False):
        blurred = gaussian_blur2d(images, kernel, sigma.expand(-1, 2))
    return torch.where((draws[:, 5] < config.blur_probability).view(-1, 1, 1, 1), blurred, images).clamp(0, 1)
