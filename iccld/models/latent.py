"""The seam (method §3, "What is z_0?"): the readings of what is diffused. Beside it, only
`programs/run/building.py`, which says what noise is drawn, knows which one is on.

- `image`: z_0 = E(clean view), condition = E(strongly augmented view). Were the condition z_0 itself, copying it would
  solve the task and diffusion would be decoration.
- `mask`: z_0 = M(labels) (pseudo-labels on target pixels), condition = E(clean view).
- `residual`: z_0 = a move of E(strong view) towards the labels (`iccld.models.residual`), condition = E(strong view).
  Stage 1 is that of `image`. What is decoded is E's latent plus the move; an untrained denoiser moves nothing.

In all, inference conditions on E(image), decodes z_0 by D, and diffuses latents of unit variance. `C h w` latent.
"""

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from iccld.models.mask_encoder import MaskEncoder
from iccld.models.residual import fitted_residual

if TYPE_CHECKING:
    from iccld.models.encoder import EncoderOutput
    from iccld.models.iccld import ICCLD


class LatentKind(Enum):
    """What z_0 is the latent of."""

    image = "image"
    mask = "mask"
    residual = "residual"

    @property
    def sees_strong_view(self) -> bool:
        """Tell whether the condition comes from the strongly augmented view, not from the clean one."""
        return self is not LatentKind.mask

    @property
    def is_of_labels(self) -> bool:
        """Tell whether z_0, and so z_t wherever it is not pure noise, gives the labels away."""
        return self is not LatentKind.image


class LatentPair(NamedTuple):
    """What is diffused and what it is conditioned on, each `(B, C, h, w)`."""

    z_0: Tensor
    condition: Tensor


def make_mask_encoder(kind: LatentKind, *, num_classes: int, latent_channels: int) -> MaskEncoder | None:
    """M, where the reading has one."""
    if kind is not LatentKind.mask:
        return None
    return MaskEncoder(num_classes=num_classes, latent_channels=latent_channels)


def raw_latent_pair(model: "ICCLD", *, clean: Tensor, seen: Tensor, labels: Tensor | None) -> LatentPair:
    """z_0 and condition as the encoders give them; their statistics are measured at the end of stage 1.

    clean, seen: E's latents of the clean view and of the view that the denoiser sees (`LatentKind.sees_strong_view`),
    `(B, C, h, w)`. labels: `(B, H, W)` uint8 or int64, 255 is ignored; only the reading `mask` asks for them.
    """
    if model.mask_encoder is None:
        return LatentPair(clean, seen)
    assert labels is not None
    return LatentPair(model.mask_encoder(labels), seen)


def diffused_latent(
    model: "ICCLD", *, clean: Tensor | None, seen: "EncoderOutput", labels: Tensor | None, weights: Tensor | None
) -> Tensor:
    """z_0 as it is diffused, `(B, C, h, w)` float32 of about zero mean and unit variance per channel.

    clean: E's latent of the clean view, for the reading `image`. seen: E's output of the view that the denoiser sees.
    labels: `(B, H, W)` uint8 or int64, 255 is ignored; weights: `(B, H, W)` float32 >= 0, for the reading `residual`.
    """
    if model.config.latent is LatentKind.residual:
        assert labels is not None and weights is not None
        return fitted_residual(model, seen, labels, weights)
    if model.mask_encoder is not None:
        assert labels is not None
        clean = model.mask_encoder(labels)
    assert clean is not None
    return normalise(clean, mean=model.latent_mean, std=model.latent_std)


def normalise(z: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """`(B, C, h, w)` to zero mean and unit variance, given the channels' statistics `(C,)`; float32."""
    return (z.float() - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def denormalise(z: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    return z * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)


def channel_moments(z: Tensor) -> Tensor:
    """`(3, C)` float64: count, sum and sum of squares per channel. Moments of batches and ranks add up."""
    values = z.double().transpose(0, 1).flatten(1)
    count = torch.full((len(values),), float(values.shape[1]), dtype=torch.float64, device=z.device)
    return torch.stack([count, values.sum(dim=1), values.square().sum(dim=1)])


def moments_to_statistics(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(C,)` float32 of `channel_moments`; a channel that is constant gets std 1."""
    count, total, squares = moments
    if not bool(torch.isfinite(moments).all()) or not bool((count > 0).all()):
        raise ValueError(
            "latent statistics: the latents measured are not finite, or none were measured; "
            "check the losses of stage 1, or measure over more images."
        )
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0.0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, torch.ones_like(std)).float()
