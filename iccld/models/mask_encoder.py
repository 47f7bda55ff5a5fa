"""M: labels to the latent of the mask (`model.latent=mask`). `B H W` labels, `K` classes, `C h w` latent."""

import torch
from torch import Tensor, nn

from iccld.models.blocks import conv_block


class MaskEncoder(nn.Module):
    """M: a shallow stride-8 convolutional encoder of the one-hot label."""

    def __init__(self, *, num_classes: int, latent_channels: int, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("classes", torch.arange(num_classes).view(1, -1, 1, 1), persistent=False)
        self.head = nn.Conv2d(width, latent_channels, 1)
        self.body = nn.Sequential(
            conv_block(num_classes, width, stride=2),
            conv_block(width, width, stride=2),
            conv_block(width, width, stride=2),
        )

    def forward(self, labels: Tensor) -> Tensor:
        """Encode `(B, H, W)` uint8 or int64 to `(B, C, ceil(H/8), ceil(W/8))`; a pixel of no class (255) is zero."""
        one_hot = labels.unsqueeze(1) == self.get_buffer("classes")
        return self.head(self.body(one_hot.to(self.head.weight.dtype)))
