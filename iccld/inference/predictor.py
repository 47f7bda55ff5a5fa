"""The function that predicts: with or without denoising, from noise that is keyed by the image's number."""

import torch
from torch import Tensor

from iccld import rng
from iccld.evaluation import Predict
from iccld.models.iccld import ICCLD


def predict_function(
    model: ICCLD, *, num_steps: int, seed: int, noise_seed: int = 0, num_averaged: int = 1, blend: float = 0.0
) -> Predict:
    """D(E(x)) for 0 steps, else `num_steps` of denoising from noise keyed by the image's number.

    Probabilities are averaged over `num_averaged` noises, and with a share `blend` of D(E(x))'s; what is returned then
    is their logarithm. Noises of two `noise_seed`s are never the same.
    """

    def denoised(images: Tensor, numbers: Tensor, draw: int) -> Tensor:
        shape, purpose = model.latent_shape(*images.shape[2:]), f"evaluation noise {draw}"
        noise = rng.normal(shape, seed=seed, purpose=purpose, numbers=numbers, device=images.device)
        return model.denoise_segment(images, noise=noise, num_steps=num_steps)

    def predict(images: Tensor, numbers: Tensor) -> Tensor:
        if num_steps == 0:
            return model.segment(images)
        count = 1 if model.deterministic else num_averaged
        maps = [denoised(images, numbers, noise_seed * count + i) for i in range(count)]
        if count == 1 and not blend:
            return maps[0]
        mean = torch.stack([logits.float().softmax(dim=1) for logits in maps]).mean(dim=0)
        if blend:
            mean = torch.lerp(mean, model.segment(images).float().softmax(dim=1), blend)
        return mean.clamp(min=1e-12).log()

    return predict
