"""The discriminator classifies the domain that its input comes from: source, target and mostly mixed.

The input, `B C h w`, is the predicted noise or clean latent, the denoiser's features, or the predicted map.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from iccld.models.blocks import TimeEmbedding
from iccld.models.settings import DiscriminatorConfig


class Discriminator(nn.Module):
    """Timestep-aware patch classifier without normalisation, which would mix samples and hide contrast."""

    def __init__(self, *, config: DiscriminatorConfig, in_channels: int, num_domains: int) -> None:
        super().__init__()
        widths = [config.width * 2**i for i in range(config.num_layers)]
        # Kernel 3 with padding halves any size rounding up, so that a latent of a few positions never vanishes.
        self.convs = nn.ModuleList(
            nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1)
            for fan_in, fan_out in zip([in_channels, *widths], widths, strict=False)
        )
        self.time = TimeEmbedding(width=config.width, out_channels=widths[0])
        self.head = nn.Conv2d(widths[-1], num_domains, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map `(B, in_channels, h, w)` and timesteps `(B,)` int64 to logits; n is the number of layers.

        They have shape `(B, num_domains, ceil(h/2^n), ceil(w/2^n))`.
        """
        hidden = self.convs[0](x) + self.time(t)[:, :, None, None]
        for conv in self.convs[1:]:
            hidden = conv(F.leaky_relu(hidden, 0.2))
        return self.head(F.leaky_relu(hidden, 0.2))
