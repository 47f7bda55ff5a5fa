"""Parts of stages, denoiser and attention: how fast the device is made to work, and what each means gains."""

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from training_peers.attention import attention_figures
from training_peers.sizes import SIZES, Ours, Size, config_of, make_stage, random_batch
from training_peers.turns import NUM_WARMUP, seconds_of

from iccld.models.blocks import GroupNorm
from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure import memory
from iccld.runtime.measure.flops import count_step
from iccld.runtime.measure.peaks import nominal_flops
from iccld.runtime.settings import Compile, EngineConfig, MatmulPrecision, Precision
from iccld.stages.base import Stage

GIB = 2**30
NUM_KERNELS = 20  # the longest of a step

Figures: TypeAlias = Iterator[tuple[str, Any]]


def size_here() -> Size:
    """The size that is measured: the published one on a GPU, a toy elsewhere."""
    return SIZES["gpu" if torch.cuda.is_available() else "toy"]


def device_here() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def attention(folder: Path) -> dict[str, Any]:
    """xformers against SDPA: results, gradients, time."""
    del folder
    return attention_figures(size_here(), device_here())


def denoiser(folder: Path) -> Figures:
    """Compare the denoiser with diffusers' UNet of as many parameters, eager and compiled."""
    from training_peers.denoisers import compare_denoisers  # the other parts need no diffusers

    del folder
    kinds = {"eager": False, "compiled": True} if torch.cuda.is_available() else {"eager": False}
    for kind, on in kinds.items():
        yield kind, compare_denoisers(size_here(), device_here(), compiled=on)


@dataclass(frozen=True)
class Variant:
    """One way to run a step: the engine's settings, and whether norms are in fp32, as autocast would have them."""

    config: EngineConfig
    fp32_norms: bool = False


def _variants() -> dict[str, Variant]:
    eager = EngineConfig(precision=Precision.bf16, compile=Compile.none)
    blocks = replace(eager, compile=Compile.blocks)
    return {
        "blocks": Variant(blocks),
        "blocks_deterministic": Variant(replace(blocks, deterministic=True)),
        "eager": Variant(eager),
        "eager_fp32_norms": Variant(eager, fp32_norms=True),
        "eager_no_cudnn_benchmark": Variant(replace(eager, cudnn_benchmark=False)),
        "tf32": Variant(replace(eager, precision=Precision.fp32, matmul_precision=MatmulPrecision.high)),
        "fp32": Variant(replace(eager, precision=Precision.fp32)),
    }


def stage(name: str, folder: Path, *, compiled: bool = False) -> Figures:
    """Samples a second, MFU, peak memory and longest kernels of a stage's step, in each variant, in turn and alone."""
    del folder
    # cuBLAS reads that when it starts, for a deterministic variant too; on Hopper it is the size that it has anyway.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    variants = {key: one for key, one in _variants().items() if (one.config.compile is Compile.blocks) == compiled}
    chosen = os.environ.get("VARIANTS", "").split()
    if not chosen and not torch.cuda.is_available():
        if compiled:
            yield "skipped", "needs CUDA"
            return
        chosen = ["eager"]
    size = size_here()
    for variant_name in [key for key in variants if not chosen or key in chosen]:
        try:
            yield variant_name, _measure(name, size, variants[variant_name])
        except (RuntimeError, NotImplementedError) as error:  # one that cannot run leaves the others their turn
            yield variant_name, {"failed": " ".join(str(error).split())[:300]}
        torch.compiler.reset()


def compile_stage(name: str, folder: Path) -> Figures:
    """Seconds of a stage's first step, compiled by blocks from cold: what it leaves in the caches, `stage` finds."""
    del folder
    if not torch.cuda.is_available():
        yield "skipped", "needs CUDA"
        return
    config = _variants()["blocks"].config
    with Engine(config) as engine:
        stage, batch = _made(name, engine)
        yield "blocks", {"first_step_s": seconds_of(Ours(stage, engine, batch), engine.device)}
        engine.detach()


def compile_denoiser(folder: Path) -> Figures:
    """Seconds of the first pass of each compiled denoiser from cold: what it leaves in the caches, `denoiser` finds."""
    from training_peers.denoisers import contenders

    del folder
    if not torch.cuda.is_available():
        yield "skipped", "needs CUDA"
        return
    for name, one in contenders(size_here(), device_here(), compiled=True).items():
        yield name, {"first_pass_s": seconds_of(one, device_here())}


def _made(name: str, engine: Engine) -> tuple[Stage, dict[str, Any]]:
    size = size_here()
    return make_stage(name, config_of(size), engine.device), random_batch(size, stage=name)


def _measure(name: str, size: Size, variant: Variant) -> dict[str, Any]:
    with _norms(variant.fp32_norms), Engine(variant.config) as engine:
        memory.restart_peak(engine.device)
        stage, batch = _made(name, engine)
        flops = count_step(stage, batch, step=0).total  # before its blocks are compiled
        ours = Ours(stage, engine, batch)
        first_s = seconds_of(ours, engine.device)
        for _ in range(NUM_WARMUP):
            ours()
        seconds = statistics.median(seconds_of(ours, engine.device) for _ in range(size.rounds))
        peak_bytes = memory.peak_memory(engine.device)
        peak = nominal_flops(engine.device, variant.config.precision.value)
        kernels = _kernels(ours, engine.device) if engine.device.type == "cuda" else {}
        engine.detach()
    return {
        "samples_per_s": size.batch_size / seconds,
        "step_s": seconds,
        "first_step_s": first_s,
        "mfu": flops / seconds / peak if peak else None,
        "peak_gib": peak_bytes / GIB,
        "flops": flops,
        **kernels,
    }


def _kernels(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Milliseconds that the device works in a step, and those of its longest kernels with their counts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        seconds_of(step, device)
    own = [one for one in profiler.key_averages() if one.device_type.name == "CUDA"]
    own.sort(key=lambda one: -one.self_device_time_total)
    longest = [[one.key[:90], round(one.self_device_time_total / 1e3, 3), one.count] for one in own[:NUM_KERNELS]]
    return {"busy_ms": sum(one.self_device_time_total for one in own) / 1e3, "kernels": longest}


@contextlib.contextmanager
def _norms(in_fp32: bool) -> Iterator[None]:
    """Measure with torch's own GroupNorm, which autocast computes in fp32, in place of ours."""
    own = GroupNorm.forward
    if in_fp32:
        GroupNorm.forward = nn.GroupNorm.forward
    try:
        yield
    finally:
        GroupNorm.forward = own


stage1: Callable[[Path], Figures] = partial(stage, "stage1")
stage2: Callable[[Path], Figures] = partial(stage, "stage2")
stage1_blocks: Callable[[Path], Figures] = partial(stage, "stage1", compiled=True)
stage2_blocks: Callable[[Path], Figures] = partial(stage, "stage2", compiled=True)
compile1: Callable[[Path], Figures] = partial(compile_stage, "stage1")
compile2: Callable[[Path], Figures] = partial(compile_stage, "stage2")
