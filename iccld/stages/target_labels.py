"""Class probabilities of the target's pixels, by the frozen networks and, if asked, the denoiser.

`B H W` images, `K` classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from iccld.models.denoiser import Denoiser
from iccld.models.encoder import EncoderOutput
from iccld.models.iccld import ICCLD


def target_probabilities(
    model: ICCLD,
    encoded: EncoderOutput,
    images: Tensor,
    *,
    denoiser: Denoiser | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Return the mean class probabilities of the images, `(B, K, H, W)` float32.

    images: `(B, 3, H, W)` in [0, 1], or `(2B, 3, H, W)`: then the second half is the first, mirrored. encoded: E's
    output of them. denoiser: if given, the mean includes D(z_0_pred, F) by one step from `noise`, shaped as E's latent.
    """
    maps = [model.decode(encoded, images.shape[-2:]).float().softmax(dim=1)]
    if denoiser is not None:
        assert noise is not None
        t = torch.full((len(noise),), len(model.alpha_bar) - 1, dtype=torch.int64, device=noise.device)
        z_0 = denoiser(noise, t, model.condition_of(encoded, images)).z_0_pred
        latent = model.decodable(z_0, encoded.latent)
        maps.append(model.decode(EncoderOutput(latent, encoded.features), images.shape[-2:]).float().softmax(dim=1))
    return torch.stack(maps).mean(dim=0) if len(maps) > 1 else maps[0]


def unmirrored(probabilities: Tensor, count: int) -> Tensor:
    """Return the mean probabilities `(count, K, H, W)` of images and of their mirrored ones, if these follow them."""
    halves: Sequence[Tensor] = probabilities.split(count)
    return halves[0] if len(halves) == 1 else (halves[0] + halves[1].flip(3)) / 2
