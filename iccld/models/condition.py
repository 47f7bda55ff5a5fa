"""The denoiser's condition: what it sees of the image. `B C h w` latent (stride 8), `H W` image, `K` classes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from iccld.models.blocks import conv_block, resample
from iccld.strides import FEATURE_STRIDES, LATENT_STRIDE

RICH_STRIDES = tuple(stride for stride in FEATURE_STRIDES if stride >= LATENT_STRIDE)


class ConditionParts(NamedTuple):
    """The parts of a rich condition, all of one view.

    latent: E's, normalised, `(B, C, h, w)`. features: E's at strides 8, 16 and 32. probabilities: `(B, K, h, w)`, D's
    of E's latent. images: `(B, 3, H, W)` in [0, 1].
    """

    latent: Tensor
    features: Sequence[Tensor]
    probabilities: Tensor
    images: Tensor


class ConditionProjection(nn.Module):
    """Project the parts of a rich condition, each to a share of `width` channels, and concatenate them at stride 8."""

    def __init__(self, *, latent_channels: int, feature_channels: Sequence[int], num_classes: int, width: int) -> None:
        """feature_channels: E's at strides 8, 16 and 32."""
        super().__init__()
        share = max(4, width // 4)
        self.features = nn.ModuleList(conv_block(channels, share, kernel_size=1) for channels in feature_channels)
        self.classes = conv_block(num_classes, share, kernel_size=1)
        self.image = nn.Sequential(
            conv_block(3, share, stride=2), conv_block(share, share, stride=2), conv_block(share, share, stride=2)
        )
        self.out_channels = latent_channels + (len(feature_channels) + 2) * share + 2

    def forward(self, condition: ConditionParts) -> Tensor:
        """Return the condition as the UNet takes it, `(B, out_channels, h, w)`."""
        latent, size = condition.latent, condition.latent.shape[-2:]
        levels = zip(self.features, condition.features, RICH_STRIDES, strict=True)
        parts = [resample(project(x), stride=s, to_stride=LATENT_STRIDE, size=size) for project, x, s in levels]
        parts += [self.classes(condition.probabilities), self.image(condition.images), _positions(latent)]
        return torch.cat([latent, *(part.to(latent.dtype) for part in parts)], dim=1)


def _positions(latent: Tensor) -> Tensor:
    """Return row and column of each position, `(B, 2, h, w)` in [-1, 1]: of the crop in training, else of the image."""
    height, width = latent.shape[-2:]
    rows, columns = (_from_minus_1_to_1(length, latent.device) for length in (height, width))
    shape = (latent.shape[0], 1, height, width)
    return torch.cat([rows.view(1, 1, -1, 1).expand(shape), columns.view(1, 1, 1, -1).expand(shape)], dim=1)


def _from_minus_1_to_1(length: int, device: torch.device) -> Tensor:
    """Return `torch.linspace(-1, 1, length)` to the bit, which itself would tie an exported model to one size."""
    index = torch.arange(length, device=device, dtype=torch.float32)
    last = index[-1:].clamp(min=1.0)
    step = (2.0 / last).double()  # as linspace, which rounds once
    return torch.where(2 * index < last, step * index - 1.0, 1.0 - step * (last - index)).float()
