"""Part 1 of bench_train.py: the denoiser's forward and backward pass, ours and diffusers' UNet2DModel.

Both have the same levels, multiples of the width and `num_blocks`, attention at the same resolutions with heads of
about the same width, two 3x3 convolutions a block scaled and shifted by the time, and parameters equal within 2 %.
UNet2DModel has one block more a level on its way up, so at the same width it is a fifth larger: its width is the one
that makes the parameters equal. Blocks and FLOPs of both are among the figures. Ours also turns its output from
velocity into noise.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_peers.sizes import Size, config_of
from training_peers.turns import ratio_of, take_turns

from iccld.models.blocks import ResidualBlock, group_norm
from iccld.models.denoiser import Denoiser
from iccld.models.settings import DenoiserConfig
from iccld.runtime.engine.compilation import compile_in_place
from iccld.runtime.settings import Compile
from iccld.stages.settings import DOMAINS
from iccld.strides import LATENT_STRIDE

TOLERANCE = 0.02  # of the numbers of parameters


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def diffusers_unet(config: DenoiserConfig, width: int, latent_channels: int) -> Any:
    levels = range(config.num_levels)
    channels = [width * multiplier for multiplier in config.channel_multipliers]
    narrowest = min([channels[i] for i in config.attention_levels] + channels[-1:])
    head_dim = max(d for d in range(1, config.head_dim + 1) if narrowest % d == 0)
    kinds = ["Attn" if i in config.attention_levels else "" for i in levels]
    return UNet2DModel(
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        layers_per_block=config.num_blocks,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=head_dim,
        norm_num_groups=group_norm(width).num_groups,
        resnet_time_scale_shift="scale_shift",
    )


def equal_unet(ours: Denoiser, latent_channels: int) -> Any:
    """The UNet2DModel with as many parameters: of the widths within tolerance, the one that kernels like best."""
    count, found = num_parameters(ours), {}
    for width in range(ours.config.width * 3 // 4 // 4 * 4, ours.config.width + 1, 4):
        with torch.device("meta"):
            off = abs(num_parameters(diffusers_unet(ours.config, width, latent_channels)) / count - 1)
        if off <= TOLERANCE:
            found[width] = (-group_norm(width).num_groups, off)
    if not found:
        raise ValueError(
            f"no UNet2DModel has the denoiser's {count:,} parameters within {TOLERANCE:.0%}; choose another width."
        )
    return diffusers_unet(ours.config, min(found, key=lambda width: found[width]), latent_channels)


def num_blocks(module: nn.Module) -> int:
    """Residual blocks."""
    return sum(isinstance(m, ResidualBlock) or type(m).__name__ == "ResnetBlock2D" for m in module.modules())


def flops_of(call: Callable[[], object]) -> int:
    """Count convolutions and matrix products, attention's included: fused kernels of a CPU are not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Pass:
    """Forward and backward of one denoiser on given latents; the gradients are dropped before the next."""

    def __init__(self, module: nn.Module, predict: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.module, self.predict, self.inputs = module, predict, inputs

    def __call__(self) -> None:
        z_t, t, condition, noise = self.inputs
        self.module.zero_grad(set_to_none=True)
        device = z_t.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            prediction = self.predict(z_t, t, condition)
        F.mse_loss(prediction.float(), noise).backward()


def contenders(size: Size, device: torch.device, *, compiled: bool) -> dict[str, Pass]:
    """Ours and theirs on equal inputs `(3B, C, h, w)`; where compiled, theirs whole, ours as in training."""
    config = config_of(size).model
    channels, side, batch = (
        config.latent_channels,
        size.crop // LATENT_STRIDE,
        len(DOMAINS) * size.batch_size,
    )  # denoised together
    torch.manual_seed(0)
    z_t, condition, noise = (torch.randn(batch, channels, side, side).to(device) for _ in range(3))
    inputs = (z_t, torch.randint(0, 1000, (batch,)).to(device), condition, noise)
    denoiser = Denoiser(config=config.denoiser, latent_channels=channels, condition_channels=channels)
    ours, theirs = denoiser.to(device), equal_unet(denoiser, channels).to(device)
    if compiled:
        compile_in_place([ours], Compile.blocks if device.type == "cuda" else Compile.whole)
        theirs.compile(dynamic=False)

    def predict_ours(z_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return ours(z_t, t, condition).noise_pred

    def predict_theirs(z_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return theirs(torch.cat([z_t, condition], dim=1), t, return_dict=False)[0]

    return {"ours": Pass(ours, predict_ours, inputs), "theirs": Pass(theirs, predict_theirs, inputs)}


def compare_denoisers(size: Size, device: torch.device, *, compiled: bool) -> dict[str, Any]:
    passes = contenders(size, device, compiled=False)
    facts = {
        name: {
            "parameters": num_parameters(one.module),
            "residual_blocks": num_blocks(one.module),
            "flops": flops_of(one),
        }
        for name, one in passes.items()
    }
    if compiled:
        passes = contenders(size, device, compiled=True)
    seconds = take_turns(passes, device, rounds=size.rounds)
    return ratio_of(seconds["ours"], seconds["theirs"], networks=facts)
