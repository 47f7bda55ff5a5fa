"""`iccld train`: the stages of a run, one after the other, each from where it stopped; then their scores.

Killed anywhere, the same command goes on: within a stage from its newest whole checkpoint, between the stages from what
the first left (`hand_off`).
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from iccld import __version__, schema
from iccld.batch_layout import BatchLayout
from iccld.config import Config, to_dict, trainer_settings
from iccld.data.stream.sets import sets_kept_open
from iccld.data.stream.stream import TrainingStream
from iccld.data.stream.workers import prepare_workers
from iccld.diagnostics import Diagnosis
from iccld.models.settings import ModelConfig
from iccld.node import launched_world_size
from iccld.outcome import blaming_the_world
from iccld.programs.evaluate.averaging import write_due_snapshot
from iccld.programs.evaluate.evaluate import asks, evaluate_models, stopped, unscored_stages
from iccld.programs.evaluate.results import finished_models, settings_checksum
from iccld.programs.evaluate.scoring import GiveUp, diagnose_model, evaluate_predictor
from iccld.programs.run.best import keep_best
from iccld.programs.run.building import build_stage, build_stream, first_batches, trials_of, whole_stage
from iccld.programs.run.checks import check_alone, check_links, check_settings, claim_run_dir, new_watchdog
from iccld.programs.run.hand_off import await_final, final_folder, hand_over, handed_over, is_finished, take_first_stage
from iccld.programs.run.kept_views import keep_views
from iccld.programs.run.metric_lines import last_entries
from iccld.programs.run.micro_batch import choose_layout
from iccld.programs.run.out_of_memory import explained_out_of_memory
from iccld.programs.run.signs import signs_of_diagnosis, signs_of_training, tell
from iccld.programs.run.synthetic import flops_per_sample
from iccld.programs.train.final_scores import log_final_scores
from iccld.programs.train.fitness import check_fitness, check_room
from iccld.programs.train.header import header_of
from iccld.programs.train.pictures import TrainingPictures
from iccld.runtime.checkpoint.store import CheckpointStore
from iccld.runtime.engine.engine import Engine, EngineKind
from iccld.runtime.faults.lock import locked
from iccld.runtime.faults.open_files import check_open_files
from iccld.runtime.faults.preemption import Preempted, Preemption
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure.memory import restart_peak
from iccld.runtime.measure.metrics import MetricsLogger
from iccld.runtime.measure.peaks import nominal_flops
from iccld.runtime.measure.telemetry import write_event
from iccld.runtime.measure.terminal import Terminal
from iccld.runtime.ranks import Ranks, together
from iccld.stages.base import Stage
from iccld.stages.table import STAGES, first_stage
from iccld.tracebacks import keep_tracebacks_in
from iccld.trainer import Trainer


def train(
    config: Config,
    preemption: Preemption | None = None,
    *,
    began: float | None = None,
    extend: bool = False,
    terminal: Terminal | None = None,
) -> bool:
    """Run the configured stages, then score them; False if a signal ended the run early. Call on every rank.

    `began`: when this attempt did, in seconds since the epoch; now, if not given. `extend`: stages that have begun, or
    are finished, may be given more steps: see `programs.run.extension`. `terminal`: where rank 0 shows what it does.
    """
    terminal = terminal or Terminal()
    began = began or time.time()
    preemption = preemption or Preemption()
    preemption.config = config.preemption
    run_dir = Path(config.run_dir)
    check_links(run_dir, config)
    check_open_files(num_workers=config.data.num_workers, world_size=launched_world_size())
    if config.data.num_workers:
        prepare_workers()  # after the limit of open files, which they inherit
    with Engine(config.engine) as engine, locked(run_dir) if engine.ranks.is_main else nullcontext("") as holder:
        ranks = engine.ranks
        check_alone(run_dir, holder, ranks)
        with new_watchdog(config, ranks) as watchdog, sets_kept_open():
            terminal.follow(watchdog)
            together(lambda: check_settings(config, engine), ranks)
            longer = claim_run_dir(run_dir, config, ranks, extend=extend)
            keep_tracebacks_in(run_dir / "logs")
            check_links(run_dir, config)  # what goes on is no longer finished
            if ranks.is_main and not all(is_finished(run_dir, stage) for stage in config.stages):
                write_event(run_dir, "launched", since=began)  # a finished run is given no further attempt
                for each in longer:
                    write_event(run_dir, "extended", stage=each.stage, before=each.before, num_steps=each.num_steps)
            watchdog.phase("preflight")
            _take_first_stage(config, ranks)
            check_fitness(config, engine)
            with blaming_the_world(lambda: watchdog.has_trained):
                return _run_stages(config, engine, preemption, watchdog, terminal)


def _take_first_stage(config: Config, ranks: Ranks) -> None:
    together(lambda: take_first_stage(config, is_main=ranks.is_main), ranks)
    if config.stage1_from:
        await_final(Path(config.run_dir), first_stage())


def _run_stages(config: Config, engine: Engine, preemption: Preemption, watchdog: Watchdog, terminal: Terminal) -> bool:
    run_dir, ranks = Path(config.run_dir), engine.ranks
    for name in config.stages:
        watchdog.begin(name)
        if ranks.from_main(is_finished(run_dir, name)):  # as rank 0 sees it: file systems cache
            if ranks.is_main:
                print(f"{name} is finished: {final_folder(run_dir, name)}", flush=True)
        elif ranks.any(preemption.came):
            return stopped(config, ranks, name)
        elif not _run_stage(name, config, engine, preemption, watchdog, terminal):
            return False
    to_score = finished_models(config) if config.data.validation.shards and unscored_stages(config) else []
    if to_score := ranks.gather(to_score)[0]:  # gathered: all ranks have read the scores before rank 0 writes them
        watchdog.begin("evaluation")
        watchdog.phase("evaluate")
        try:
            evaluate_models(to_score, config, engine, give_up=asks(preemption, watchdog))
        except Preempted:
            return stopped(config, ranks, "evaluation")
    if ranks.is_main:
        log_final_scores(config, ranks)
    return True


def _run_stage(
    name: str, config: Config, engine: Engine, preemption: Preemption, watchdog: Watchdog, terminal: Terminal
) -> bool:
    trainer, layout = trainer_settings(name, config), choose_layout(name, trials_of(name, config, engine, watchdog))
    stream = build_stream(name, config, layout)
    stage = build_stage(name, config, engine.device)
    check_room(stage, layout, config, engine.ranks)
    restart_peak(engine.device)
    folder = Path(config.run_dir) / name
    metrics = _metrics(stage, layout, config, engine, terminal)
    terminal.header(header_of(stage, layout, config, engine))
    checkpoints = CheckpointStore(
        folder / "checkpoints", trainer.checkpoint, engine.ranks, announce=lambda at: metrics.event("saved", step=at)
    )
    with explained_out_of_memory(stage, layout, config, engine, watchdog=watchdog, checkpoints=checkpoints):
        with keep_views(stage, config, engine, stream):
            finished = Trainer(
                stage=stage,
                stream=stream,
                engine=engine,
                checkpoints=checkpoints,
                metrics=metrics,
                preemption=preemption,
                watchdog=watchdog,
                config=trainer,
                layout=layout,
                about=_about(stage, config, stream),
                pictures=TrainingPictures(stage, config, engine, metrics=metrics, watchdog=watchdog),
                evaluate=lambda step: _validate(stage, config, engine, asks(preemption, watchdog), step=step),
                after_step=lambda step: write_due_snapshot(stage, folder / "ema", engine, step=step),
            ).run()
        if finished:
            _finish(stage, config, engine)
    if finished:
        metrics.event("finished", step=trainer.num_steps)
    engine.detach()
    metrics.close()
    return finished


def _finish(stage: Stage, config: Config, engine: Engine) -> None:
    """Leave the models of a stage that was trained to its end. Call on every rank."""
    stage = whole_stage(stage, config, engine)
    if engine.ranks.is_main:
        measure_latents(stage, config, engine)
        _warn(stage, config)
        hand_over(stage, config, step=trainer_settings(stage.name, config).num_steps)
    engine.ranks.barrier()
    await_final(Path(config.run_dir), stage.name)


def measure_latents(stage: Stage, config: Config, engine: Engine) -> None:
    """Let a trained stage measure what the next one needs, on its own device. Call on one rank."""
    stage.finish(engine.prefetch(first_batches(stage.name, config)))


def _metrics(stage: Stage, layout: BatchLayout, config: Config, engine: Engine, terminal: Terminal) -> MetricsLogger:
    precision = engine.accelerator.mixed_precision
    return MetricsLogger(
        Path(config.run_dir),
        config.metrics,
        stage=stage.name,
        ranks=engine.ranks,
        layout=layout,
        terminal=terminal,
        flops=_flops(stage, config, engine),
        names_slow_rank=engine.kind is EngineKind.ddp,  # others exchange in every phase
        peak_flops=1e12 * config.metrics.peak_tflops or nominal_flops(engine.device, precision),
    )


def _flops(stage: Stage, config: Config, engine: Engine) -> Callable[[int], float]:
    """Count the FLOPs of a sample in a step, fewer during a warm start; 0 on ranks that write no metrics, and if they
    cannot be counted.
    """
    begin = stage.first_whole_step
    if not engine.ranks.is_main:
        return lambda step: 0.0
    try:
        counts = {step: flops_per_sample(stage, config, step).total for step in {0, begin}}
    except (ValueError, RuntimeError, NotImplementedError) as error:  # a backbone with an operation that has no rule
        print(f"{stage.name}: no FLOPs and no MFU: {str(error).splitlines()[0]}", flush=True)
        return lambda step: 0.0
    return lambda step: counts[0 if step < begin else begin]


def _validate(stage: Stage, config: Config, engine: Engine, give_up: GiveUp, *, step: int) -> dict[str, float]:
    """The teacher's scores and diagnostics in mid-training: with the fewest denoising steps where there is a denoiser.

    What they, and the lines logged so far, warn of is told now, and the best teacher is kept.
    """
    models = whole_stage(stage, config, engine).assemble_models()
    model = models["teacher"]
    kind, inference = STAGES[stage.name], config.inference
    fewest = kind.fewest_steps(inference)
    predict = kind.predictor(model, inference, seed=config.seed, num_steps=fewest)
    result = evaluate_predictor(predict, config, engine, give_up=give_up)
    values = {"miou": result.miou, "boundary_miou": result.boundary_miou}
    values |= {f"iou/{name}": iou for name, iou in zip(result.names, result.iou, strict=True)}
    diagnosis = None
    if config.evaluation.diagnostic_images:
        options = {"student": models["student"], "with_bounds": False, "give_up": give_up}
        diagnosis = diagnose_model(model, config, engine, **options)
        values |= diagnosis.to_metrics()
    if not math.isnan(result.miou):
        score = {"miou": result.miou, "num_steps": fewest, "num_images": result.num_images}
        score |= {"settings": settings_checksum(config)}
        keep = partial(keep_best, model, config, stage=stage.name, step=step, score=score)
        together(keep if engine.ranks.is_main else lambda: None, engine.ranks)
    if engine.ranks.is_main:
        _warn(stage, config, diagnosis)
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _warn(stage: Stage, config: Config, diagnosis: Diagnosis | None = None) -> None:
    """Tell the signs of failure in the stage's figures. Call on one rank."""
    run_dir = Path(config.run_dir)
    signs = signs_of_training(last_entries(run_dir), config, stage.name)
    signs += signs_of_diagnosis(diagnosis) if diagnosis else []
    tell(signs, run_dir=run_dir, stage=stage.name)


def _about(stage: Stage, config: Config, stream: TrainingStream) -> Mapping[str, Any]:
    resolved = to_dict(config)
    model = dict(resolved["model"])
    for part in ("encoder", "denoiser"):
        model[part] = {key: value for key, value in model[part].items() if key != "activation_checkpointing"}
    for name, value in schema.values_when_absent(ModelConfig).items():  # an earlier version wrote none of them
        if model[name] == value:
            del model[name]
    previous = STAGES[stage.name].previous
    about = {
        "version": __version__,
        "stage": stage.name,
        "model": model,
        "data": stream.fingerprints(),
        "origin": handed_over(previous, config)[1].model_sha256 if previous else config.initial_model,
        "rebuilding_config": stage.assemble_models()["student"].rebuilding_config(),
        "config": resolved,
    }
    return json.loads(json.dumps(about))  # as a resume reads it: keys are strings
