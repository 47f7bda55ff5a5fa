"""Figures of a profile: a rank's seconds and memory, rates, FLOPs, sizes, and facts of the launch."""

import statistics
from typing import Any

import torch

from iccld.batch_layout import BatchLayout
from iccld.config import Config
from iccld.node import host_name
from iccld.programs.run.out_of_memory import parts_held
from iccld.runtime.engine.device import device_name
from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure import memory
from iccld.runtime.measure.flops import StepFlops
from iccld.runtime.measure.peaks import measured_flops, nominal_flops, wait_for
from iccld.runtime.measure.profiling import BETWEEN_STEPS, OVERLAPPED, PHASES, PhaseTimer, Seconds
from iccld.runtime.tensors import bytes_of
from iccld.stages.base import Stage


def of_this_rank(steps: list[Seconds], stage: Stage, engine: Engine) -> dict[str, Any]:
    return {
        "rank": engine.ranks.rank,
        "host": host_name(),
        "peak_bytes": memory.peak_memory(engine.device),
        "held_bytes": {part: sum(map(bytes_of, of.values())) for part, of in parts_held(stage, engine).items()},
        "step_s": [step["total"] - sum(step.get(phase, 0.0) for phase in BETWEEN_STEPS) for step in steps],
        "phases": {phase: _median(steps, phase) for phase in (*PHASES, OVERLAPPED) if phase not in BETWEEN_STEPS},
    }


def rates_of(
    ranks: list[dict[str, Any]], layout: BatchLayout, flops: float, config: Config, engine: Engine
) -> dict[str, Any]:
    """Compute the rates; `flops` are a sample's."""
    step_s = statistics.median(map(max, zip(*(rank["step_s"] for rank in ranks), strict=True)))
    achieved = flops * layout.global_batch_size / step_s / layout.world_size
    peak_flops, source = _peak(config, engine)
    return {
        "step_s": step_s,
        "samples_per_s": layout.global_batch_size / step_s,
        "samples_per_s_per_rank": layout.global_batch_size / step_s / layout.world_size,
        "achieved_flops_per_rank": achieved,
        "peak_flops": peak_flops,
        "peak_source": source,
        "mfu": achieved / peak_flops,
    }


def flops_of(flops: StepFlops) -> dict[str, Any]:
    prepare = sum(flops.prepare.values())
    return {
        "flops_per_sample": {"prepare": prepare, "train": flops.total - prepare},
        "flops_by_part": {
            part: {kind: getattr(flops, kind).get(part, 0) for kind in flops._fields}
            for part in sorted({part for by_part in flops for part in by_part})
        },
    }


def sizes_of(stage: Stage, engine: Engine, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the bytes that a step exchanges, and those that a checkpoint holds."""
    trained = sum(p.numel() for group in stage.param_groups() for p in group["params"])
    stored = [run.data.nbytes for run in engine.runs(_state(stage)).values()]
    return {
        "num_parameters": trained,
        "gradient_bytes": 4 * trained,
        "teacher_bytes": sum(rank["held_bytes"]["averages"] for rank in ranks)
        // (1 if engine.is_sharded else len(ranks)),
        "save_stall_s": _copy_to_host_s(stage, engine),
        "checkpoint_bytes": sum(engine.ranks.gather(sum(stored))),
    }


def launch_of(engine: Engine, layout: BatchLayout, hosts: list[str]) -> dict[str, Any]:
    device = engine.device
    return {
        "engine": engine.kind.value,
        "world_size": layout.world_size,
        "num_nodes": len(set(hosts)),
        "device": device_name(device),
        "precision": engine.config.precision.name,
        "compile": engine.compile.value,
        "threads": torch.get_num_threads(),
        "global_batch_size": layout.global_batch_size,
        "micro_batch_size": layout.micro_batch_size,
        "num_accumulation": layout.num_accumulation,
    }


def _median(steps: list[Seconds], phase: str) -> float:
    return statistics.median(step.get(phase, 0.0) for step in steps)


def _peak(config: Config, engine: Engine) -> tuple[float, str]:
    """Return the peak FLOP/s of a device, and the source of the figure."""
    if config.metrics.peak_tflops:
        return 1e12 * config.metrics.peak_tflops, "metrics.peak_tflops"
    precision = engine.accelerator.mixed_precision
    if nominal := nominal_flops(engine.device, precision):
        return nominal, "the device's data sheet"
    measured = engine.ranks.gather(
        measured_flops(engine.device, precision)
    )  # all ranks at the same time, as in training
    return statistics.median(measured), "measured: a matrix product on every rank at once"


def _copy_to_host_s(stage: Stage, engine: Engine) -> float:
    """Measure the seconds that a step pays for a save: the slowest rank's copy of its part of the state."""
    clock = PhaseTimer()
    wait_for(engine.device)
    for _ in range(2):  # the first makes the buffers
        with clock.span("copy"):
            _ = [run.data.to("cpu", copy=True) for run in engine.runs(_state(stage)).values()]
        clock.end_step()
    return max(engine.ranks.gather(clock.take()[-1]["copy"]))


def _state(stage: Stage) -> dict[str, Any]:
    return {f"stage/{name}": tensor for name, tensor in stage.state_dict().items()}
