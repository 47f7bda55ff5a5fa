"""`iccld profile key=value ...`: a short run of an experiment under any launch, and where its time and memory went.

Each configured stage is trained for some steps, as `iccld train` would, from fresh weights, and nothing of it is kept
but the report: `RUN_DIR/profile/stage1/` with profile.json, profile.png and a trace of a few steps of every rank.
"""

import statistics
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from iccld.config import Config, StageName, load_config
from iccld.programs.building import build_stage, build_stream, fresh_stage, layout_of, trials_of
from iccld.programs.checks import check_settings
from iccld.programs.hand_off import is_finished
from iccld.programs.micro_batch import with_micro_batch_size
from iccld.programs.out_of_memory import explained_out_of_memory, parts_held
from iccld.programs.profile_report import write_report
from iccld.programs.roofline import roofline, work_by_part
from iccld.programs.synthetic import flops_per_sample, synthetic_batches
from iccld.runtime import memory
from iccld.runtime.engine import Engine
from iccld.runtime.flops import StepFlops
from iccld.runtime.peak_flops import measured_flops, nominal_flops, wait_for
from iccld.runtime.preemption import host_name
from iccld.runtime.profiling import OUTSIDE, OVERLAPPED, PHASES, PhaseTimer, Ranges, Seconds
from iccld.runtime.watchdog import Watchdog
from iccld.stages.base import Stage
from iccld.trainer import TrainerConfig, attach
from iccld.training_step import TrainingStep

FORMAT = 1
VERSIONS = ("torch", "accelerate", "deepspeed", "transformers", "xformers")


@dataclass(frozen=True)
class ProfileOptions:
    """How many steps are timed, left out before them, and traced after them; `synthetic`: batches without data."""

    num_steps: int
    num_warmup: int
    num_traced: int
    synthetic: bool

    def __post_init__(self) -> None:
        for name, least in (("num_steps", 2), ("num_warmup", 1), ("num_traced", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {least}.")

    @property
    def num_all(self) -> int:
        return self.num_warmup + self.num_steps + self.num_traced


def run(arguments: Namespace) -> int:
    """Profile the stages. Raises ValueError where the user erred."""
    options = ProfileOptions(arguments.num_steps, arguments.num_warmup, arguments.num_traced, arguments.synthetic)
    config = load_config(arguments.overrides, config_dir=arguments.config_dir)
    output = arguments.output or Path(config.run_dir) / "profile"
    with Engine(config.engine) as engine:
        if not options.synthetic:
            check_settings(config, engine)
        for name in config.stages:
            folder = output / name.value
            folder.mkdir(parents=True, exist_ok=True)
            figures = profile_stage(name, config, engine, options, folder)  # the same on every rank
            if engine.is_main:
                write_report(figures, folder)
            engine.detach()
    return 0


def profile_stage(
    name: StageName, config: Config, engine: Engine, options: ProfileOptions, folder: Path
) -> dict[str, Any]:
    """The figures of profile.json, the same on every rank; the traces are written into the folder."""
    watchdog = Watchdog(Path(config.run_dir), rank=engine.rank, world_size=engine.world_size)
    plan = with_micro_batch_size(name.value, trials_of(name, config, engine, watchdog))
    plan = replace(plan, num_steps=max(plan.num_steps, options.num_all))
    is_made = name is StageName.stage1 or engine.gather_objects(is_finished(Path(config.run_dir), StageName.stage1))[0]
    stage = (build_stage if is_made else fresh_stage)(name, config, engine.device)
    flops = flops_per_sample(stage, config)
    work = work_by_part(stage, config, plan.chosen_micro_batch_size)
    memory.restart_peak(engine.device)
    with explained_out_of_memory(stage, plan, config, engine, watchdog=watchdog):
        attach(stage, engine, plan)
        steps, traced = _run(stage, plan, config, engine, options, folder)
    ranks = engine.gather_objects(_of_this_rank(steps, stage, engine) | {"trace": traced})
    return {
        "format": FORMAT,
        "stage": name.value,
        **_launch(engine, plan, options, [rank["host"] for rank in ranks]),
        **_rates(ranks, plan, flops.total, config, engine),
        "ranks": ranks,
        **_flops(flops),
        **_sizes(stage, engine, ranks),
        "roofline": roofline(stage, config, work, plan.chosen_micro_batch_size, engine),
        "versions": {"iccld": version("iccld"), **{package: version(package) for package in VERSIONS}},
    }


def _of_this_rank(steps: list[Seconds], stage: Stage, engine: Engine) -> dict[str, Any]:
    return {
        "rank": engine.rank,
        "host": host_name(),
        "peak_bytes": memory.peak_memory(engine.device),
        "held_bytes": {part: sum(map(memory.bytes_of, of.values())) for part, of in parts_held(stage, engine).items()},
        "step_s": [step["total"] - sum(step.get(phase, 0.0) for phase in OUTSIDE) for step in steps],
        "phases": {phase: _median(steps, phase) for phase in (*PHASES, OVERLAPPED) if phase not in OUTSIDE},
    }


def _rates(
    ranks: list[dict[str, Any]], plan: TrainerConfig, flops: float, config: Config, engine: Engine
) -> dict[str, Any]:
    """`flops` are a sample's."""
    step_s = statistics.median(map(max, zip(*(rank["step_s"] for rank in ranks), strict=True)))
    achieved = flops * plan.global_batch_size / step_s / engine.world_size
    peak_flops, source = _peak(config, engine)
    return {
        "step_s": step_s,
        "samples_per_s": plan.global_batch_size / step_s,
        "samples_per_s_per_rank": plan.global_batch_size / step_s / engine.world_size,
        "achieved_flops_per_rank": achieved,
        "peak_flops": peak_flops,
        "peak_source": source,
        "mfu": achieved / peak_flops,
    }


def _flops(flops: StepFlops) -> dict[str, Any]:
    prepare = sum(flops.prepare.values())
    return {
        "flops_per_sample": {"prepare": prepare, "train": flops.total - prepare},
        "flops_by_part": {
            part: {kind: getattr(flops, kind).get(part, 0) for kind in flops._fields}
            for part in sorted({part for by_part in flops for part in by_part})
        },
    }


def _sizes(stage: Stage, engine: Engine, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What a step exchanges, and what a checkpoint holds."""
    trained = sum(p.numel() for group in stage.param_groups() for p in group["params"])
    stored = [run.data.nbytes for run in engine.runs(_state(stage)).values()]
    return {
        "num_parameters": trained,
        "gradient_bytes": 4 * trained,
        "teacher_bytes": sum(rank["held_bytes"]["averages"] for rank in ranks)
        // (1 if engine.is_sharded else len(ranks)),
        "save_stall_s": _copy_to_host_s(stage, engine),
        "checkpoint_bytes": sum(engine.gather_objects(sum(stored))),
    }


def _state(stage: Stage) -> dict[str, Any]:
    return {f"stage/{name}": tensor for name, tensor in stage.state_dict().items()}


def _launch(engine: Engine, plan: TrainerConfig, options: ProfileOptions, hosts: list[str]) -> dict[str, Any]:
    device = engine.device
    return {
        "engine": engine.kind.value,
        "world_size": engine.world_size,
        "num_nodes": len(set(hosts)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": engine.config.precision.name,
        "compile": engine.config.compile,
        "threads": torch.get_num_threads(),
        "synthetic": options.synthetic,
        "global_batch_size": plan.global_batch_size,
        "micro_batch_size": plan.chosen_micro_batch_size,
        "num_accumulation": plan.num_accumulation(engine.world_size),
        "num_steps": options.num_steps,
        "num_warmup": options.num_warmup,
    }


def _run(
    stage: Stage, plan: TrainerConfig, config: Config, engine: Engine, options: ProfileOptions, folder: Path
) -> tuple[list[Seconds], str]:
    """The timed steps' seconds, and the trace's file. The last steps of the stage: nothing is left out there."""
    first, layout = plan.num_steps - options.num_all, layout_of(plan, engine)
    if options.synthetic:
        made: Any = nullcontext(synthetic_batches(config, layout, first))
    else:
        made = closing(build_stream(StageName(stage.name), config, layout).batches(first))
    with made as batches:
        timer = PhaseTimer(engine.device)
        batches = engine.prefetch(batches, copying=lambda: timer.span(OVERLAPPED))
        _steps(stage, engine, timer, batches, range(first, first + options.num_warmup))
        wait_for(engine.device)
        timer.take()
        first += options.num_warmup
        _steps(stage, engine, timer, batches, range(first, first + options.num_steps))
        wait_for(engine.device)
        timed = timer.take()
        first += options.num_steps
        if not options.num_traced:
            return timed, ""
        path = folder / f"trace_rank_{engine.rank:05d}.json.gz"
        with torch.profiler.profile() as trace, Ranges() as ranges:
            _steps(stage, engine, PhaseTimer(engine.device, ranges.begin), batches, range(first, plan.num_steps))
            wait_for(engine.device)
        trace.export_chrome_trace(str(path))
        return timed, path.name


def _steps(stage: Stage, engine: Engine, timer: PhaseTimer, batches: Iterator[Mapping[str, Any]], steps: range) -> None:
    """As the trainer's loop, without what is between steps."""
    train = TrainingStep(stage, engine, timer)
    for step in steps:
        with timer.phase("data"):
            micro_batches = [next(batches) for _ in range(engine.backend.plan.num_accumulation)]
        with timer.span("agree"):
            engine.any(False)
        train(micro_batches, step)
        timer.end_step()


def _median(steps: list[Seconds], phase: str) -> float:
    return statistics.median(step.get(phase, 0.0) for step in steps)


def _peak(config: Config, engine: Engine) -> tuple[float, str]:
    """FLOP/s of a device, and where the figure is from."""
    if config.metrics.peak_tflops:
        return 1e12 * config.metrics.peak_tflops, "metrics.peak_tflops"
    precision = engine.accelerator.mixed_precision
    if nominal := nominal_flops(engine.device, precision):
        return nominal, "the device's data sheet"
    measured = engine.gather_objects(measured_flops(engine.device, precision))  # at once, as they train
    return statistics.median(measured), "measured: a matrix product on every rank at once"


def _copy_to_host_s(stage: Stage, engine: Engine) -> float:
    """What a step pays for a save: seconds of the slowest rank for the copy of its part of the state."""
    clock = PhaseTimer()
    wait_for(engine.device)
    for _ in range(2):  # the first makes the buffers
        with clock.span("copy"):
            _ = [run.data.to("cpu", copy=True) for run in engine.runs(_state(stage)).values()]
        clock.end_step()
    return max(engine.gather_objects(clock.take()[-1]["copy"]))
