"""Part 4 of bench_train.py: xformers against SDPA on a GPU, at the shapes of the denoiser: outputs, gradients, time."""

from typing import Any

import torch
from torch import Tensor
from training_peers.sizes import Size, config_of
from training_peers.turns import ratio_of, take_turns

from iccld.models.attention import attention, check_backend
from iccld.models.settings import AttentionBackend
from iccld.stages.settings import DOMAINS
from iccld.strides import LATENT_STRIDE

TOLERANCE = 2e-2  # of bf16 results, relative to the largest


def attention_figures(size: Size, device: torch.device) -> dict[str, Any]:
    """Compare the two, or say under `skipped` why they cannot be compared here."""
    try:
        check_backend(AttentionBackend.xformers, device.type)
        return compare_attention(size, device)
    except (ValueError, NotImplementedError) as error:  # the latter: it was built without kernels for this device
        return {"skipped": " ".join(str(error).split())}


def compare_attention(size: Size, device: torch.device) -> dict[str, Any]:
    """Measure how much faster xformers is, forward and backward, at each level with attention.

    The geometric mean of the levels is judged.
    """
    config = config_of(size).model.denoiser
    levels = {}
    for level in sorted({*config.attention_levels, config.num_levels - 1}):
        side = size.crop // LATENT_STRIDE // 2**level
        shape = (
            len(DOMAINS) * size.batch_size,
            side * side,
            config.channels[level] // config.head_dim,
            config.head_dim,
        )
        levels[f"{side}x{side}"] = _compare(shape, device, rounds=size.rounds)
    ratios = torch.tensor([own["ratio"] for own in levels.values()])
    mean = float(ratios.log().mean().exp())
    better = AttentionBackend.xformers if mean > 1 else AttentionBackend.sdpa
    return {"ratio": mean, "faster": better.name, "levels": levels}


def _compare(shape: tuple[int, ...], device: torch.device, *, rounds: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, upstream = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator, requires_grad=i < 3)
        for i in range(4)
    )

    def run(backend: AttentionBackend) -> tuple[Tensor, ...]:
        output = attention(q, k, v, backend)
        return output, *torch.autograd.grad(output, (q, k, v), upstream)

    pairs = zip(run(AttentionBackend.xformers), run(AttentionBackend.sdpa), strict=True)
    off = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
    if off > TOLERANCE:
        raise RuntimeError(f"xformers and SDPA differ by {off:.3f} of the largest value at {shape}")
    calls = {backend.name: lambda backend=backend: run(backend) for backend in AttentionBackend}
    seconds = take_turns(calls, device, rounds=rounds)
    return ratio_of(seconds["xformers"], seconds["sdpa"], difference=off, shape=list(shape))
