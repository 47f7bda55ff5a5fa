"""Parts 2 and 5 of bench_train.py: whole steps, ours and others' on equal modules and batches; ours alone on a GPU."""

import gc
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from training_peers.peers import DAFormerOrder, TwoOptimisers
from training_peers.sizes import Ours, Size, config_of, make_stage, random_batch
from training_peers.turns import NUM_WARMUP, ratio_of, seconds_of, take_turns

from iccld.data.storage.cache import CacheConfig
from iccld.programs.run.kept_views import ViewFiles
from iccld.programs.run.synthetic import synthetic_batch
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure.flops import count_step
from iccld.runtime.measure.peaks import nominal_flops
from iccld.runtime.measure.profiling import PhaseTimer
from iccld.runtime.settings import Compile, EngineConfig, Precision
from iccld.stages.view_cache import ViewCache

NUM_TIMED = 500  # empty steps
PEERS: dict[str, Any] = {"stage1": DAFormerOrder, "stage2": TwoOptimisers}


def bf16_where_fast(device: torch.device) -> Precision:
    """bf16 on GPUs and on processors with instructions for it; elsewhere it is slower than fp32."""
    is_fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Precision.bf16 if is_fast else Precision.fp32


def compare_steps(
    name: str,
    size: Size,
    precision: Precision,
    *overrides: str,
    **peer: Any,
) -> dict[str, Any]:
    """Ours against the stage's peer, made with the options `peer`; equal weights at the start, one batch for all."""
    config, batch = config_of(size, *overrides), random_batch(size)
    with Engine(EngineConfig(precision=precision)) as engine:
        ours = Ours(make_stage(name, config, engine.device), engine, batch)
        theirs = PEERS[name](make_stage(name, config, engine.device), batch, **peer)
        seconds = take_turns({"ours": ours, "theirs": theirs}, engine.device, rounds=size.rounds)
        engine.detach()
    return ratio_of(seconds["ours"], seconds["theirs"], batch_size=size.batch_size)


def compare_cache(size: Size, precision: Precision, *overrides: str) -> dict[str, Any]:
    """Stage 2 whose views are found in the cache (ours) against one without (theirs); and one that fills it.

    One stage for all, which takes the views from elsewhere at each turn.
    """
    config = config_of(size, *overrides)
    batch = synthetic_batch(config, range(size.batch_size))
    with Engine(EngineConfig(precision=precision)) as engine, tempfile.TemporaryDirectory() as folder:
        stage: Any = make_stage("stage2", config, engine.device)
        ours, files = Ours(stage, engine, batch), ViewFiles(CacheConfig(folder, 16.0), setting="stage2.cache")
        full, new = (ViewCache(size.batch_size, files, identity=name) for name in ("full", "new"))

        def step(cache: ViewCache | None) -> None:
            stage.view_cache = cache
            new.identity = f"new {ours.step}"
            ours()
            new.finish()

        calls = {"ours": partial(step, full), "theirs": partial(step, None), "filling": partial(step, new)}
        seconds = take_turns(calls, engine.device, rounds=size.rounds)
        entry_mib = max(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20
        engine.detach()
    filling_s = statistics.median(seconds["filling"])
    return ratio_of(seconds["ours"], seconds["theirs"], filling_s=filling_s, entry_mib=entry_mib)


def measure_stage(name: str, size: Size, precision: Precision) -> dict[str, dict[str, Any]]:
    """Measure on a GPU, eager and compiled: samples a second (of the source), MFU, peak memory."""
    found, flops = {}, 0
    for kind in ("eager", "compiled"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        compiled = Compile.blocks if kind == "compiled" else Compile.none
        with Engine(EngineConfig(precision=precision, compile=compiled)) as engine:
            stage, batch = make_stage(name, config_of(size), engine.device), random_batch(size)
            flops = flops or count_step(stage, batch, step=0).total
            peak = nominal_flops(engine.device, precision.value)
            ours = Ours(stage, engine, batch)
            for _ in range(NUM_WARMUP):
                ours()
            seconds = statistics.median(seconds_of(ours, engine.device) for _ in range(size.rounds))
            engine.detach()
            del stage, ours
        found[kind] = {
            "samples_per_s": size.batch_size / seconds,
            "step_s": seconds,
            "flops": flops,
            "mfu": flops / seconds / peak if peak else None,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    return found


def timing_share(step_s: float, device: torch.device) -> dict[str, Any]:
    """Measure the cost of timing phases: of a step with nothing else in it, over one of `step_s` seconds."""
    timer, x = PhaseTimer(device, Watchdog().phase), torch.ones(1, device=device, requires_grad=True)

    def bare() -> None:
        x.sum().backward()

    def timed() -> None:
        for name in ("data", "prepare", "optimizer", "average"):
            with timer.phase(name):
                pass
        for _ in range(2):
            with timer.span("agree"):
                pass
        with timer.phase("forward"):
            loss = x.sum()
        with timer.backward(loss):
            loss.backward()
        timer.end_step()
        timer.take()

    seconds = take_turns({"bare": bare, "timed": timed}, device, rounds=NUM_TIMED)
    cost = statistics.median(seconds["timed"]) - statistics.median(seconds["bare"])
    return {"ratio": cost / step_s, "cost_s": cost}
