"""Building blocks that more than one box of the figure uses. `B C H W` maps of any resolution."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iccld.models.attention import attention
from iccld.models.settings import AttentionBackend
from iccld.strides import FEATURE_STRIDES


class GroupNorm(nn.GroupNorm):
    """GroupNorm that keeps its input's dtype; mean and variance are summed in fp32 inside the kernel.

    Autocast would compute and return fp32. That doubles the memory traffic of what costs most after the convolutions,
    and stores twice as much for the backward pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(B, C, ...)` of any float dtype; the result has the same shape and dtype."""
        if input.is_meta:  # autocast does not apply there
            return super().forward(input)
        if input.dtype == self.weight.dtype and not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)  # turning off what is off would cut an exported graph in two
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)


def group_norm(channels: int) -> GroupNorm:
    """Make a GroupNorm of at most 32 groups, with at least 4 channels a group if there are as many."""
    groups = math.gcd(channels, 32)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return GroupNorm(groups, channels)


def conv_block(in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Make convolution, GroupNorm and GELU; the output's size is `ceil(size / stride)`."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, group_norm(out_channels), nn.GELU())


def resample(x: Tensor, *, stride: int, to_stride: int, size: Sequence[int]) -> Tensor:
    """Bring a map from one stride to another, cropped to `size`, without shifting it against the image.

    Scaling is by the exact ratio of the strides: a map of `ceil(H / 32)` rows covers more than the image, and squeezing
    it into the image's rows would misplace it.
    """
    if stride > to_stride:
        x = F.interpolate(x, scale_factor=float(stride // to_stride), mode="bilinear", align_corners=False)
    elif stride < to_stride:
        x = F.avg_pool2d(x, to_stride // stride, ceil_mode=True)
    return x if tuple(x.shape[-2:]) == tuple(size) else x[..., : size[0], : size[1]]


class FeatureFusion(nn.Module):
    """Project the encoder's features, each to an equal share of `out_channels`, and concatenate them at one stride."""

    def __init__(self, *, feature_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        share = out_channels // len(feature_channels)
        self.projections = nn.ModuleList(conv_block(channels, share, kernel_size=1) for channels in feature_channels)

    def forward(self, features: Sequence[Tensor], *, to_stride: int, size: Sequence[int]) -> Tensor:
        """Map features of strides 4, 8, 16, 32 to `(B, out_channels, *size)` at `to_stride`."""
        levels = zip(self.projections, features, FEATURE_STRIDES, strict=True)
        resampled = [resample(project(x), stride=s, to_stride=to_stride, size=size) for project, x, s in levels]
        return torch.cat(resampled, dim=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip; a time embedding, if there is one, scales and shifts between them."""

    def __init__(self, in_channels: int, out_channels: int, *, time_channels: int = 0) -> None:
        super().__init__()
        self.norm_in, self.norm_out = group_norm(in_channels), group_norm(out_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_channels, 2 * out_channels) if time_channels else None
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Map `(B, in_channels, H, W)` and time `(B, time_channels)` to `(B, out_channels, H, W)`."""
        hidden = self.norm_out(self.conv_in(F.silu(self.norm_in(x))))
        if self.time is not None and time is not None:
            scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
            hidden = hidden * (1.0 + scale) + shift
        return self.skip(x) + self.conv_out(F.silu(hidden))


class SelfAttention(nn.Module):
    """Attention between all positions of a map, around a skip."""

    def __init__(self, channels: int, *, head_dim: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.head_dim, self.backend = head_dim, backend
        self.norm = group_norm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Map `(B, C, H, W)` to the same shape; `time` is ignored: the residual blocks beside it use it."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.to_qkv(tokens).chunk(3, dim=-1))
        mixed = self.to_out(attention(q, k, v, self.backend).flatten(2))
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[-2:])


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep through a two-layer MLP."""

    def __init__(self, *, width: int, out_channels: int) -> None:
        super().__init__()
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(width // 2) / (width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * len(frequencies), out_channels), nn.SiLU(), nn.Linear(out_channels, out_channels)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps `(B,)` int64: `(B, out_channels)`."""
        angles = t.float()[:, None] * self.get_buffer("frequencies")
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))
