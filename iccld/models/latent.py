"""The readings of what is diffused (`model.latent`). The properties of `LatentKind`, a setting, say what each reading
means; `ICCLD.diffused_latent` and `ICCLD.decodable` compute it. All others ask these.

- `image`: z_0 = E(clean view), condition = E(strongly augmented view). Were the condition z_0 itself, copying it would
  solve the task and diffusion would be decoration.
- `mask`: z_0 = M(labels) (pseudo-labels on target pixels), condition = E(clean view).
- `residual`: z_0 = a move of E(strong view) towards the labels (`iccld.models.residual`), condition = E(strong view).
  Stage 1 is that of `image`. What is decoded is E's latent plus the move; an untrained denoiser moves nothing.

In all, inference conditions on E(image) and decodes z_0 by D. What is diffused has unit variance by channel; a move has
at most that. `C h w` latent.
"""

import torch
from torch import Tensor

from iccld.models.mask_encoder import MaskEncoder
from iccld.models.settings import LatentKind


def make_mask_encoder(kind: LatentKind, *, num_classes: int, latent_channels: int) -> MaskEncoder | None:
    """Make M, if the reading has one."""
    if not kind.has_mask_encoder:
        return None
    return MaskEncoder(num_classes=num_classes, latent_channels=latent_channels)


def normalise(z: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """Map `(B, C, h, w)` to zero mean and unit variance, by the channels' statistics `(C,)`; float32."""
    return (z.float() - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def denormalise(z: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """Invert `normalise`."""
    return z * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)


def channel_moments(z: Tensor) -> Tensor:
    """Return count, sum and sum of squares per channel, `(3, C)` float64. Moments of batches and ranks add up."""
    values = z.double().transpose(0, 1).flatten(1)
    count = torch.full((len(values),), float(values.shape[1]), dtype=torch.float64, device=z.device)
    return torch.stack([count, values.sum(dim=1), values.square().sum(dim=1)])


def moments_to_statistics(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Turn `channel_moments` into mean and std `(C,)` float32; a constant channel gets std 1."""
    count, total, squares = moments
    if not bool(torch.isfinite(moments).all()) or not bool((count > 0).all()):
        raise ValueError(
            "latent statistics: the latents measured are not finite, or none were measured; "
            "check the losses of stage 1, or measure over more images."
        )
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0.0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, torch.ones_like(std)).float()
