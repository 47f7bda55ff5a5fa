"""D: latent to logits, with the inter-coder connection to the encoder's features. `B C h w` latent, `K` classes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iccld.models.blocks import FeatureFusion, ResidualBlock, conv_block, group_norm
from iccld.models.settings import DecoderConfig
from iccld.strides import LATENT_STRIDE, LOGITS_STRIDE


class DecoderLevel(nn.Module):
    """One resolution of D: its own map, the encoder's features beside it, residual blocks."""

    def __init__(
        self, *, in_channels: int, width: int, num_blocks: int, feature_channels: Sequence[int], inter_coder: bool
    ) -> None:
        super().__init__()
        self.width = width
        self.connection = FeatureFusion(feature_channels=feature_channels, out_channels=width) if inter_coder else None
        self.merge = conv_block(in_channels + (width if inter_coder else 0), width)
        self.blocks = nn.Sequential(*(ResidualBlock(width, width) for _ in range(num_blocks)))

    def forward(self, x: Tensor, features: Sequence[Tensor] | None, *, stride: int, keep: Tensor | None) -> Tensor:
        """Map `(B, in_channels, h', w')` to `(B, width, h', w')`; `stride` is the map's."""
        if self.connection is None:
            return self.blocks(self.merge(x))
        if features is None:
            connected = x.new_zeros(len(x), self.width, *x.shape[-2:])
        else:
            connected = self.connection(features, to_stride=stride, size=x.shape[-2:])
            if keep is not None:
                connected = connected * keep.to(connected.dtype).view(-1, 1, 1, 1)
        return self.blocks(self.merge(torch.cat([x, connected], dim=1)))


class Decoder(nn.Module):
    """D: at stride 8 and stride 4, E's low- and high-level features are concatenated with D's own maps."""

    def __init__(
        self, *, config: DecoderConfig, latent_channels: int, feature_channels: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        shared = {
            "num_blocks": config.num_blocks,
            "feature_channels": feature_channels,
            "inter_coder": config.inter_coder,
        }
        half = config.width // 2
        self.stem = nn.Conv2d(latent_channels, config.width, 3, padding=1)
        self.coarse = DecoderLevel(in_channels=config.width, width=config.width, **shared)
        self.fine = DecoderLevel(in_channels=config.width, width=half, **shared)
        self.head = nn.Sequential(group_norm(half), nn.SiLU(), nn.Conv2d(half, num_classes, 1))

    def forward(self, latent: Tensor, features: Sequence[Tensor] | None, keep: Tensor | None = None) -> Tensor:
        """Decode a latent `(B, C, h, w)` to logits `(B, K, 2h, 2w)` of stride 4.

        features: E's four maps (strides 4 to 32). The connection is cut (zeros take its place) for every sample if
        `features` is None, and for each sample whose `keep`, `(B,)` bool, is False.
        """
        x = self.coarse(self.stem(latent), features, stride=LATENT_STRIDE, keep=keep)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = self.fine(x, features, stride=LOGITS_STRIDE, keep=keep)
        return self.head(x)
