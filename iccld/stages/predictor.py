"""Predict functions, from a model and `inference` to logits: scores, pictures and label maps all use them."""

from collections.abc import Callable

import torch
from torch import Tensor

from iccld import rng
from iccld.models.iccld import ICCLD
from iccld.stages.settings import InferenceConfig

Predictor = Callable[[Tensor, Tensor], Tensor]
"""See `iccld.evaluation.Predict`: images `(B, 3, H, W)` float32 in [0, 1] and numbers `(B,)` int64 to logits."""


def predictor_of(
    model: ICCLD, inference: InferenceConfig, *, seed: int, num_steps: int, noise_seed: int = 0
) -> Predictor:
    """Return a function that gives D(E(x)) for 0 steps, else denoises in `num_steps` from noise keyed by the number.

    Probabilities are averaged over `inference.num_averaged` noises, and with a share `inference.blend` of D(E(x))'s;
    what the function returns then is their logarithm. Noises of two `noise_seed`s differ.
    """
    count, blend = 1 if model.deterministic else inference.num_averaged, inference.blend

    def denoised(images: Tensor, numbers: Tensor, draw: int) -> Tensor:
        shape, purpose = model.latent_shape(*images.shape[2:]), f"evaluation noise {draw}"
        noise = rng.normal(shape, seed=seed, purpose=purpose, numbers=numbers, device=images.device)
        return model.denoise_segment(
            images, noise=noise, num_steps=num_steps, solver=inference.solver, start=inference.start
        )

    def predict(images: Tensor, numbers: Tensor) -> Tensor:
        if num_steps == 0:
            return model.segment(images)
        maps = [denoised(images, numbers, noise_seed * count + i) for i in range(count)]
        if count == 1 and not blend:
            return maps[0]
        mean = torch.stack([logits.float().softmax(dim=1) for logits in maps]).mean(dim=0)
        if blend:
            mean = torch.lerp(mean, model.segment(images).float().softmax(dim=1), blend)
        return mean.clamp(min=1e-12).log()

    return predict
