"""The reading `residual`: z_0 is a small move of E's latent, r = (z* - z_E) / σ (`C h w` latent).

z* is the end of a few gradient steps from E's latent towards the labels, through the frozen D. Each step has the root
mean square `residual_step` over a sample, in units of the latent's standard deviations; σ is the length of all steps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from iccld.labels import IGNORE_INDEX


def residual_scale(std: Tensor, *, residual_steps: int, residual_step: float) -> Tensor:
    """Return σ, `(1, C, 1, 1)`, by which r has a root mean square of at most 1. std: the latent's, `(C,)`."""
    return residual_steps * residual_step * std.view(1, -1, 1, 1)


def fitted_residual(
    decode: Callable[[Tensor], Tensor],
    latent: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    std: Tensor,
    residual_steps: int,
    residual_step: float,
) -> Tensor:
    """Return r of each sample, `(B, C, h, w)` float32, without a gradient.

    decode: D, which maps a latent, with the features of the view that the denoiser sees, to logits. latent: E's of that
    view, `(B, C, h, w)`. labels: `(B, H, W)`, 255 is ignored. weights: `(B, H, W)` float32 >= 0; a pixel's weight is
    its share in the gradient, and a sample's mean weight, if below 1, shortens its steps. std: the latent's, `(C,)`.
    """
    unit = std.view(1, -1, 1, 1)
    valid = (labels != IGNORE_INDEX).float()
    trust = (weights * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1.0)
    trust = trust.clamp(max=1.0)  # a balance of classes can raise the weights that pasting leaves
    start = latent.float()
    move = torch.zeros_like(start)
    for _ in range(residual_steps):
        with torch.enable_grad():
            at = move.detach().requires_grad_()
            logits = decode(start + unit * at).float()
            logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
            losses = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE_INDEX, reduction="none")
            (gradient,) = torch.autograd.grad((losses * weights).sum(), [at])
        size = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        move = move - residual_step * trust.view(-1, 1, 1, 1) * gradient / size
    return move / (residual_steps * residual_step)
