"""`iccld profile key=value ...`: a short run of an experiment under any launch, and where its time and memory went.

Each configured stage is trained for some steps, as `iccld train` would, from fresh weights or behind the run's finished
stage 1. Nothing of it is kept but the report: `RUN_DIR/profile/stage1/` with profile.json, profile.png and a trace of a
few steps of every rank.
"""

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from iccld import __version__
from iccld.batch_layout import BatchLayout
from iccld.config import Config, load_config
from iccld.data.stream.sets import sets_kept_open
from iccld.durable import make_folder, replacing
from iccld.extras import version_of
from iccld.node import launched_world_size
from iccld.programs.profile.figures import flops_of, launch_of, of_this_rank, rates_of, sizes_of
from iccld.programs.profile.report import write_report
from iccld.programs.profile.roofline import roofline, work_by_part
from iccld.programs.run.building import build_stage, build_stream, fresh_stage, trials_of
from iccld.programs.run.checks import check_settings, new_watchdog
from iccld.programs.run.hand_off import is_finished
from iccld.programs.run.micro_batch import choose_layout
from iccld.programs.run.out_of_memory import explained_out_of_memory
from iccld.programs.run.synthetic import flops_per_sample, synthetic_batch, synthetic_batches
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.open_files import check_open_files
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure import memory
from iccld.runtime.measure.peaks import wait_for
from iccld.runtime.measure.profiling import OVERLAPPED, PhaseTimer, Ranges
from iccld.runtime.ranks import together
from iccld.stages.base import Stage
from iccld.stages.table import STAGES
from iccld.trainer import TrainingStep, attach

FORMAT = 1
VERSIONS = ("torch", "accelerate", "deepspeed", "transformers", "xformers")


@dataclass(frozen=True)
class ProfileOptions:
    """Numbers of steps: timed, left out before them, and traced after them; `synthetic`: batches without data."""

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
    """Profile the stages. Raises ValueError if the user erred."""
    options = ProfileOptions(arguments.num_steps, arguments.num_warmup, arguments.num_traced, arguments.synthetic)
    config = load_config(arguments.overrides, config_dir=arguments.config_dir)
    output = arguments.output or Path(config.run_dir) / "profile"
    make_folder(output, within=arguments.output or Path(config.run_dir))
    own = replace(config, run_dir=str(output))  # events of the profile are no part of the run
    check_open_files(num_workers=config.data.num_workers, world_size=launched_world_size())
    with Engine(config.engine) as engine, new_watchdog(own, engine.ranks) as watchdog, sets_kept_open():
        if not options.synthetic:
            together(lambda: check_settings(config, engine), engine.ranks)
        for name in config.stages:
            folder = output / name
            make_folder(folder, within=output)
            watchdog.begin(name)
            figures = profile_stage(name, config, engine, options, watchdog, folder)  # the same on every rank
            if engine.ranks.is_main:
                write_report(figures, folder)
            engine.detach()
    return 0


def profile_stage(
    name: str, config: Config, engine: Engine, options: ProfileOptions, watchdog: Watchdog, folder: Path
) -> dict[str, Any]:
    """Return the figures of profile.json; write the traces, and what a failure leaves, into the folder."""
    previous = STAGES[name].previous
    is_made = not previous or engine.ranks.from_main(is_finished(Path(config.run_dir), previous))
    build = partial(build_stage if is_made else fresh_stage, name, config, engine.device)
    own = replace(config, run_dir=str(folder.parent))
    trials = replace(trials_of(name, config, engine, watchdog), config=own, build=build)
    if options.synthetic:
        trials = replace(trials, batch=lambda size: synthetic_batch(config, range(size)))
    layout, settings = choose_layout(name, trials), trials.settings
    settings = replace(settings, num_steps=max(settings.num_steps, options.num_all))
    stage = build()
    flops = flops_per_sample(stage, config, settings.num_steps - 1)
    work = work_by_part(stage, config, layout.micro_batch_size)
    memory.restart_peak(engine.device)
    with explained_out_of_memory(stage, layout, own, engine, watchdog=watchdog):
        attach(stage, engine, layout, gradient_clip=settings.gradient_clip)
        of_this_rank = _measured(stage, layout, settings.num_steps, config, engine, options, watchdog, folder)
    watchdog.phase("finish")
    ranks = engine.ranks.gather(of_this_rank)
    return {
        "format": FORMAT,
        "stage": name,
        **launch_of(engine, layout, [rank["host"] for rank in ranks]),
        **{name: getattr(options, name) for name in ("synthetic", "num_steps", "num_warmup")},
        **rates_of(ranks, layout, flops.total, config, engine),
        "ranks": ranks,
        **flops_of(flops),
        **sizes_of(stage, engine, ranks),
        "roofline": roofline(stage, config, work, layout.micro_batch_size, engine),
        "versions": {"iccld": __version__, **{package: version_of(package, absent="unknown") for package in VERSIONS}},
    }


def _measured(
    stage: Stage,
    layout: BatchLayout,
    end: int,
    config: Config,
    engine: Engine,
    options: ProfileOptions,
    watchdog: Watchdog,
    folder: Path,
) -> dict[str, Any]:
    """Measure this rank in the last steps before `end`, which have every loss."""
    first = end - options.num_all
    if options.synthetic:
        made: Any = nullcontext(synthetic_batches(stage.name, config, layout, first))
    else:
        made = closing(build_stream(stage.name, config, layout).batches(first))
    with made as batches:
        timer = PhaseTimer(engine.device, watchdog.phase)
        batches = engine.prefetch(batches, copying=lambda: timer.span(OVERLAPPED))
        _steps(stage, engine, timer, batches, range(first, first + options.num_warmup))
        wait_for(engine.device)
        timer.take()
        first += options.num_warmup
        _steps(stage, engine, timer, batches, range(first, first + options.num_steps))
        wait_for(engine.device)
        found = of_this_rank(timer.take(), stage, engine)
        first += options.num_steps
        if not options.num_traced:
            return found | {"trace": ""}
        path = folder / f"trace_rank_{engine.ranks.rank:05d}.json.gz"
        with torch.profiler.profile() as trace, Ranges() as ranges:
            _steps(stage, engine, PhaseTimer(engine.device, ranges.begin), batches, range(first, end))
            wait_for(engine.device)
        with tempfile.TemporaryDirectory() as scratch, replacing(path) as file:
            trace.export_chrome_trace(f"{scratch}/{path.name}")
            with Path(scratch, path.name).open("rb") as written:
                shutil.copyfileobj(written, file)
        return found | {"trace": path.name}


def _steps(stage: Stage, engine: Engine, timer: PhaseTimer, batches: Iterator[Mapping[str, Any]], steps: range) -> None:
    """Run the trainer's loop, without the work between steps."""
    train = TrainingStep(stage, engine, timer)
    for step in steps:
        with timer.phase("data"):
            micro_batches = [next(batches) for _ in range(engine.backend.terms.layout.num_accumulation)]
        with timer.span("agree"):
            engine.ranks.any(False)
        train(micro_batches, step)
        timer.end_step()
