"""Predict functions, from a model and `inference` to logits: scores, pictures and label maps all use them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from iccld import rng
from iccld.diffusion import Solver
from iccld.models.iccld import ICCLD

Predictor = Callable[[Tensor, Tensor], Tensor]
"""See `iccld.evaluation.Predict`: images `(B, 3, H, W)` float32 in [0, 1] and numbers `(B,)` int64 to logits."""


class Weights(Enum):
    """The models that a stage leaves, and the teacher that scored best in training (`evaluate_every`)."""

    teacher = "teacher"
    student = "student"
    best = "best"


@dataclass
class InferenceConfig:
    """Settings of prediction: which weights, and how many denoising steps (0: the decoder alone, as after stage 1)."""

    weights: Weights = Weights.teacher  # which model predicts; best: the teacher that scored best in training
    num_steps: list[int] = field(
        default_factory=lambda: [1, 4, 50]
    )  # denoising steps; 0, beside others: the decoder alone
    solver: Solver = Solver.ddim  # how the steps follow the denoiser
    start: float = 1.0  # where denoising begins: 1 is pure noise, 0.5 half-way, from E's latent with noise
    noise_seeds: int = 1  # each is scored on its own
    num_averaged: int = 1  # denoised from so many noises, whose class probabilities are averaged
    blend: float = 0.0  # share of D(E(x))'s probabilities, as after stage 1, in the denoised ones

    def __post_init__(self) -> None:
        if not self.num_steps or min(self.num_steps) < 0 or max(self.num_steps) > 1000:
            raise ValueError(f"inference.num_steps={self.num_steps} must be numbers of denoising steps, 0 to 1000.")
        for name in ("noise_seeds", "num_averaged"):
            if getattr(self, name) < 1:
                raise ValueError(f"inference.{name}={getattr(self, name)} must be at least 1.")
        if not 0.0 <= self.blend <= 1.0:
            raise ValueError(f"inference.blend={self.blend} must be between 0 (off) and 1 (stage 1's map alone).")

        if not 0.0 < self.start <= 1.0:
            raise ValueError(f"inference.start={self.start} must be above 0, and at most 1 (pure noise).")

    def refuse_no_denoising(self, stages: Sequence[str]) -> None:
        """Refuse numbers of steps among which none denoises, if stage 2 is among the stages. Raises ValueError.

        Saved settings of earlier versions may hold them: only what is asked for now is refused.
        """
        if "stage2" in stages and not any(self.num_steps):
            raise ValueError(
                f"inference.num_steps={self.num_steps} would score stage 2 by the decoder alone, as stage 1 is scored; "
                f"give a number of denoising steps, as [1], or [1,0] to see both."
            )


def predictor_of(
    model: ICCLD, inference: InferenceConfig, *, seed: int, num_steps: int, noise_seed: int = 0
) -> Predictor:
    """Return a function that gives D(E(x)) for 0 steps, else denoises in `num_steps` from noise keyed by the number.

    Probabilities are averaged over `inference.num_averaged` noises, and with a share `inference.blend` of D(E(x))'s;
    what the function returns then is their logarithm. Noises of two `noise_seed`s are never the same.
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
