"""Parts attention, denoiser, stage1 and stage2: how fast the device is made to work, and what each means gains."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training_peers.attention import attention_figures
from training_peers.sizes import SIZES, Ours, Size, config_of, make_stage, random_batch
from training_peers.turns import NUM_WARMUP, seconds_of

from iccld.config import StageName
from iccld.models.blocks import GroupNorm
from iccld.runtime import memory
from iccld.runtime.compilation import Compile
from iccld.runtime.engine import Engine, EngineConfig, MatmulPrecision, Precision
from iccld.runtime.flops import count_step
from iccld.runtime.peak_flops import nominal_flops

GIB = 2**30


def size_here() -> Size:
    """The size that is measured: the published one on a GPU, a toy elsewhere."""
    return SIZES["gpu" if torch.cuda.is_available() else "toy"]


def device_here() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def attention(folder: Path) -> dict[str, Any]:
    """xformers against SDPA: results, gradients, time."""
    del folder
    return attention_figures(size_here(), device_here())


def denoiser(folder: Path) -> dict[str, Any]:
    """The denoiser against diffusers' UNet of as many parameters, eager and compiled."""
    from training_peers.denoisers import compare_denoisers  # the other parts need no diffusers

    del folder
    kinds = {"eager": False, "compiled": True} if torch.cuda.is_available() else {"eager": False}
    return {kind: compare_denoisers(size_here(), device_here(), compiled=on) for kind, on in kinds.items()}


@dataclass(frozen=True)
class Variant:
    """One way to run a step: the engine's settings, and whether norms are in fp32, as autocast would have them."""

    config: EngineConfig
    fp32_norms: bool = False


def _variants() -> dict[str, Variant]:
    eager = EngineConfig(precision=Precision.bf16, compile=Compile.none)
    blocks = replace(eager, compile=Compile.blocks)
    return {
        "fp32": Variant(replace(eager, precision=Precision.fp32)),
        "tf32": Variant(replace(eager, precision=Precision.fp32, matmul_precision=MatmulPrecision.high)),
        "eager_fp32_norms": Variant(eager, fp32_norms=True),
        "eager_no_cudnn_benchmark": Variant(replace(eager, cudnn_benchmark=False)),
        "eager": Variant(eager),
        "blocks": Variant(blocks),
        "blocks_deterministic": Variant(replace(blocks, deterministic=True)),
    }


def stage(name: str, folder: Path) -> dict[str, Any]:
    """Samples a second, MFU and peak memory of a stage's step, in each variant, each in turn and alone."""
    del folder
    size, found = size_here(), {}
    chosen = _variants() if torch.cuda.is_available() else {"eager": _variants()["eager"]}
    for variant_name, variant in chosen.items():
        try:
            found[variant_name] = _measure(name, size, variant)
        except (RuntimeError, NotImplementedError) as error:  # one that cannot run leaves the others their turn
            found[variant_name] = {"failed": " ".join(str(error).split())[:300]}
        torch.compiler.reset()
    return found


def _measure(name: str, size: Size, variant: Variant) -> dict[str, Any]:
    with _norms(variant.fp32_norms), Engine(variant.config) as engine:
        memory.restart_peak(engine.device)
        stage, batch = make_stage(name, config_of(size), engine.device), random_batch(size, stage=StageName(name))
        flops = count_step(stage, batch, step=0).total
        ours = Ours(stage, engine, batch)
        first_s = seconds_of(ours, engine.device)
        for _ in range(NUM_WARMUP):
            ours()
        seconds = statistics.median(seconds_of(ours, engine.device) for _ in range(size.rounds))
        peak_bytes = memory.peak_memory(engine.device)
        peak = nominal_flops(engine.device, variant.config.precision.value)
        engine.detach()
    return {
        "samples_per_s": size.batch_size / seconds,
        "step_s": seconds,
        "first_step_s": first_s,
        "mfu": flops / seconds / peak if peak else None,
        "peak_gib": peak_bytes / GIB,
        "flops": flops,
    }


@contextlib.contextmanager
def _norms(in_fp32: bool) -> Iterator[None]:
    """With torch's own GroupNorm, which autocast computes in fp32, in place of ours."""
    own = GroupNorm.forward
    if in_fp32:
        GroupNorm.forward = nn.GroupNorm.forward
    try:
        yield
    finally:
        GroupNorm.forward = own


stage1: Callable[[Path], dict[str, Any]] = partial(stage, "stage1")
stage2: Callable[[Path], dict[str, Any]] = partial(stage, "stage2")
