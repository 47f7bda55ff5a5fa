"""The denoiser: a UNet with attention that predicts the noise in z_t, given the condition. `B C h w` latent."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iccld.diffusion import noise_from_velocity, scaled_linear_alpha_bar, z_0_from_velocity
from iccld.models.attention import check_backend, default_device_type
from iccld.models.blocks import ResidualBlock, SelfAttention, TimeEmbedding, group_norm
from iccld.models.condition import ConditionParts, ConditionProjection
from iccld.models.settings import DenoiserConfig


class DenoiserOutput(NamedTuple):
    """The network's `velocity`, and the noise and the clean latent that it implies, each `(B, C, h, w)` float32.

    `middle` `(B, middle_channels, h', w')`: the UNet's narrowest features.
    """

    velocity: Tensor
    noise_pred: Tensor
    z_0_pred: Tensor
    middle: Tensor


class Denoiser(nn.Module):
    """epsilon_theta(z_t, t | condition).

    The network's own output is the velocity, from which the noise follows. Near pure noise a network that outputs the
    noise itself has to copy its input to within a hundredth, as z_0 magnifies its error 14 times: it cannot sample in
    few steps before it has been trained for long.
    """

    alpha_bar: Tensor
    can_recompute = True  # as for the encoder

    def __init__(
        self,
        *,
        config: DenoiserConfig,
        latent_channels: int,
        condition_channels: int,
        rich: ConditionProjection | None = None,
        starts_at_zero: bool = False,
    ) -> None:
        """Build the network; `condition_channels` are the condition's channels as the UNet sees it.

        `rich` makes these channels out of the parts of a rich condition. `starts_at_zero`: untrained, z_0_pred is
        exactly 0 at the last timestep, where z_t has to be pure noise.
        """
        super().__init__()
        check_backend(config.attention, default_device_type())
        self.register_buffer("alpha_bar", scaled_linear_alpha_bar(), persistent=False)
        self.config, channels, time_channels = config, config.channels, 4 * config.width
        self.time = TimeEmbedding(width=config.width, out_channels=time_channels)
        self.stem = nn.Conv2d(latent_channels + condition_channels, channels[0], 3, padding=1)
        levels = range(config.num_levels)
        self.down = nn.ModuleList(self._level(i, channels[i]) for i in levels)
        self.shrink = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1) for i in levels[:-1]
        )
        self.middle = nn.ModuleList([self._residual(channels[-1], channels[-1]), self._attention(channels[-1])])
        self.middle.append(self._residual(channels[-1], channels[-1]))
        self.up = nn.ModuleList(self._level(i, 2 * channels[i]) for i in reversed(levels))
        self.grow = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i - 1], 3, padding=1) for i in reversed(levels) if i > 0
        )
        self.head = nn.Sequential(
            group_norm(channels[0]), nn.SiLU(), nn.Conv2d(channels[0], latent_channels, 3, padding=1)
        )
        self.rich, self.starts_at_zero = rich, starts_at_zero
        self._shrink_output(0.0 if starts_at_zero else 0.1)

    @property
    def middle_channels(self) -> int:
        return self.config.channels[-1]

    def forward(self, z_t: Tensor, t: Tensor, condition: Tensor | ConditionParts) -> DenoiserOutput:
        """Predict from z_t and condition `(B, C, h, w)` float of any h, w, and t `(B,)` int64; see `DenoiserOutput`.

        A rich denoiser takes `ConditionParts`.
        """
        time = self.time(t)
        x = self.stem(torch.cat([z_t, self._condition_channels(condition)], dim=1))
        skips: list[list[Tensor]] = []
        for level, blocks in enumerate(self.down):
            x, outputs = self._descend(blocks, x, time, level)
            skips.append(outputs)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        for block in self.middle:
            x = self._run_part(block, x, time, self.config.num_levels)
        middle = x
        for i, blocks in enumerate(self.up):
            outputs = skips.pop()
            if i > 0:
                x = F.interpolate(x, size=outputs[-1].shape[-2:], mode="nearest")
                x = self.grow[i - 1](x)
            x = self._ascend(blocks, x, outputs, time, len(skips))
        return self._output(z_t, t, self.head(x), middle)

    def _output(self, z_t: Tensor, t: Tensor, velocity: Tensor, middle: Tensor) -> DenoiserOutput:
        velocity = velocity.float()  # half precision has errors of about a hundredth
        noise_pred = noise_from_velocity(z_t, velocity, t, self.alpha_bar)
        if self.starts_at_zero:  # pure noise says nothing of z_0
            z_t = z_t.masked_fill((t == len(self.alpha_bar) - 1).view(-1, 1, 1, 1), 0.0)
        return DenoiserOutput(velocity, noise_pred, z_0_from_velocity(z_t, velocity, t, self.alpha_bar), middle)

    def _condition_channels(self, condition: Tensor | ConditionParts) -> Tensor:
        if self.rich is None:
            assert isinstance(condition, Tensor)
            return condition
        assert isinstance(condition, ConditionParts)
        return self.rich(condition)

    def _residual(self, in_channels: int, out_channels: int) -> ResidualBlock:
        return ResidualBlock(in_channels, out_channels, time_channels=4 * self.config.width)

    def _attention(self, channels: int) -> SelfAttention:
        return SelfAttention(channels, head_dim=self.config.head_dim, backend=self.config.attention)

    def _level(self, level: int, in_channels: int) -> nn.ModuleList:
        """Build `num_blocks` lists of a residual block and, if the level has it, attention."""
        width, with_attention = self.config.channels[level], level in self.config.attention_levels
        return nn.ModuleList(
            nn.ModuleList([self._residual(in_channels, width)] + ([self._attention(width)] if with_attention else []))
            for _ in range(self.config.num_blocks)
        )

    def _descend(self, blocks: nn.Module, x: Tensor, time: Tensor, level: int) -> tuple[Tensor, list[Tensor]]:
        outputs = []
        for parts in blocks.children():
            for part in parts.children():
                x = self._run_part(part, x, time, level)
            outputs.append(x)
        return x, outputs

    def _ascend(self, blocks: nn.Module, x: Tensor, skips: list[Tensor], time: Tensor, level: int) -> Tensor:
        for parts, skip in zip(blocks.children(), reversed(skips), strict=True):
            x = torch.cat([x, skip], dim=1)
            for part in parts.children():
                x = self._run_part(part, x, time, level)
        return x

    def _run_part(self, part: nn.Module, x: Tensor, time: Tensor, level: int) -> Tensor:
        if level < self.config.num_recomputed_levels and torch.is_grad_enabled():
            # No layer draws random numbers, so there is no generator state to save.
            return checkpoint(part, x, time, use_reentrant=False, preserve_rng_state=False)
        return part(x, time)

    def _shrink_output(self, factor: float) -> None:
        """Start near zero, not at zero, unless the untrained output must be nothing.

        The usual zero initialisation predicts no noise at first, but the gradient reaches the earlier layers through
        the last convolution's weight: were it zero, the first adversarial step would change nothing but the last layer.
        """
        last = self.head[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        with torch.no_grad():
            last.weight.mul_(factor)
            last.bias.zero_()
