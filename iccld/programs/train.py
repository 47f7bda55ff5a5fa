"""`iccld train`: the stages of a run, one after the other, each from where it stopped; then their scores.

Killed anywhere, the same command goes on: within a stage from its newest whole checkpoint, between the stages from what
the first left (`hand_off`).
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from iccld import __version__
from iccld.config import Config, StageName, to_dict
from iccld.data.config import BatchLayout
from iccld.data.stream import TrainingStream
from iccld.models.discriminator import Discriminator
from iccld.models.iccld import ICCLD
from iccld.programs.checks import check_alone, check_run_dir, check_settings, plan_of, watch
from iccld.programs.ema import write_due_snapshot
from iccld.programs.evaluate import (
    asks,
    evaluate_models,
    evaluate_predictor,
    finished_models,
    predict_function,
    stopped,
    unscored_stages,
)
from iccld.programs.fitness import check_fitness, check_room
from iccld.programs.hand_off import final_folder, hand_over, handed_over, is_finished
from iccld.programs.micro_batch import Trials, with_micro_batch_size
from iccld.programs.out_of_memory import explained_out_of_memory
from iccld.runtime.checkpoint import CheckpointStore
from iccld.runtime.engine import Engine
from iccld.runtime.lock import locked
from iccld.runtime.metrics import MetricsLogger, write_event
from iccld.runtime.preemption import Preempted, Preemption
from iccld.runtime.watchdog import Watchdog
from iccld.stages.adversarial import AdversarialStage, AdversaryInput
from iccld.stages.base import Stage
from iccld.stages.segmentation import SegmentationStage
from iccld.trainer import Trainer, TrainerConfig


def train(config: Config, preemption: Preemption | None = None, *, began: float | None = None) -> bool:
    """Run the configured stages, then score them; False if a signal ended the run early. Call on every rank.

    `began`: when this attempt did, in seconds since the epoch; now, if not given.
    """
    began = began or time.time()
    preemption = preemption or Preemption()
    preemption.config = config.preemption
    run_dir = Path(config.run_dir)
    with Engine(config.engine) as engine, locked(run_dir) if engine.is_main else nullcontext("") as holder:
        check_alone(run_dir, holder, engine)
        with watch(config, engine) as watchdog:
            check_settings(config, engine)
            check_run_dir(run_dir, config, engine)
            if engine.is_main:
                write_event(run_dir, "launched", since=began)
            watchdog.phase("preflight")
            check_fitness(config, engine)
            return _run_stages(config, engine, preemption, watchdog)


def _run_stages(config: Config, engine: Engine, preemption: Preemption, watchdog: Watchdog) -> bool:
    run_dir = Path(config.run_dir)
    for name in config.stages:
        watchdog.begin(name.value)
        if engine.gather_objects(is_finished(run_dir, name))[0]:  # as rank 0 sees it: file systems cache
            if engine.is_main:
                print(f"{name.value} is finished: {final_folder(run_dir, name)}", flush=True)
        elif engine.any(preemption.came):
            return stopped(config, engine, name.value)
        elif not _run_stage(name, config, engine, preemption, watchdog):
            return False
    if config.data.validation.shards and unscored_stages(config):
        watchdog.begin("evaluation")
        watchdog.phase("evaluate")
        try:
            evaluate_models(finished_models(config), config, engine, give_up=asks(preemption, watchdog))
        except Preempted:
            return stopped(config, engine, "evaluation")
    return True


def _run_stage(name: StageName, config: Config, engine: Engine, preemption: Preemption, watchdog: Watchdog) -> bool:
    plan = with_micro_batch_size(name.value, _trials(name, config, engine, watchdog))
    stream = _stream(name, config, _layout(plan, engine))
    stage = build_stage(name, config, engine.device)
    check_room(stage, plan, config, engine)
    folder = Path(config.run_dir) / name.value
    metrics = _metrics(name, config, engine)
    checkpoints = CheckpointStore(
        folder / "checkpoints", plan.checkpoint, engine, announce=lambda step: metrics.event("saved", step=step)
    )
    with explained_out_of_memory(stage, plan, config, engine, watchdog=watchdog, checkpoints=checkpoints):
        finished = Trainer(
            stage=stage,
            stream=stream,
            engine=engine,
            checkpoints=checkpoints,
            metrics=metrics,
            preemption=preemption,
            watchdog=watchdog,
            config=plan,
            about=_about(stage, config, stream),
            evaluate=lambda: _validate(stage, config, engine, asks(preemption, watchdog)),
            after_step=lambda step: write_due_snapshot(stage, folder / "ema", engine, num_steps=step + 1),
        ).run()
    if finished:
        stage = _whole_stage(stage, config, engine)
        if engine.is_main:
            stage.finish(_first_batches(name, config))
            hand_over(stage, config, step=plan.num_steps)
        engine.barrier()
        metrics.event("finished", step=plan.num_steps)
    engine.detach()
    metrics.close()
    return finished


def _layout(plan: TrainerConfig, engine: Engine) -> BatchLayout:
    return BatchLayout(
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.chosen_micro_batch_size,
        num_accumulation=plan.num_accumulation(engine.world_size),
        rank=engine.rank,
        world_size=engine.world_size,
    )


def _trials(name: StageName, config: Config, engine: Engine, watchdog: Watchdog) -> Trials:
    """How a micro-batch size can be tried: on a stage and a stream of its own."""
    without_workers = replace(config, data=replace(config.data, num_workers=0))

    def first_samples(size: int) -> Mapping[str, Any]:
        layout = BatchLayout(size * engine.world_size, size, rank=engine.rank, world_size=engine.world_size)
        with closing(_stream(name, without_workers, layout).batches(0)) as batches:
            return next(batches)

    def build() -> Stage:
        return build_stage(name, config, engine.device)

    return Trials(plan_of(name, config), config, engine, watchdog, build, first_samples)


def _metrics(name: StageName, config: Config, engine: Engine) -> MetricsLogger:
    return MetricsLogger(
        Path(config.run_dir),
        config.metrics,
        stage=name.value,
        is_main=engine.is_main,
        world_size=engine.world_size,
        sum_values=engine.sum_values,
        gather=engine.gather_objects,
    )


def _stream(name: StageName, config: Config, layout: BatchLayout) -> TrainingStream:
    return TrainingStream(
        config.data,
        seed=config.seed,
        layout=layout,
        with_target=name is StageName.stage2 or config.stage1.objective.adapt,
        target_labels=config.stage1.objective.target_labels,
    )


def build_stage(name: StageName, config: Config, device: torch.device) -> Stage:
    """The stage with its model on the device; stage 2 takes E, D and the latent's statistics from stage 1."""
    torch.manual_seed(config.seed)
    num_classes = config.data.class_set.build().num_classes
    if name is StageName.stage1:
        model = ICCLD(config=config.model, num_classes=num_classes, with_denoiser=False)
        reference = copy.deepcopy(model.encoder) if config.stage1.objective.feature_distance_weight else None
        if config.initial_model:
            _load_initial(model, Path(config.initial_model))
        return SegmentationStage(model.to(device), config.stage1.objective, seed=config.seed, reference=reference)
    model = ICCLD.from_pretrained(handed_over(config)[0], num_classes=num_classes)
    model.start_denoiser(config.model.denoiser)
    assert model.denoiser is not None
    sees_middle = config.stage2.objective.adversary_input is AdversaryInput.features
    channels = model.denoiser.middle_channels if sees_middle else config.model.latent_channels
    discriminator = Discriminator(config=config.model.discriminator, in_channels=channels)
    return AdversarialStage(model.to(device), discriminator.to(device), config.stage2.objective, seed=config.seed)


def _whole_stage(stage: Stage, config: Config, engine: Engine) -> Stage:
    """The stage itself, or, where ranks hold shards, one like it with the whole weights. Call on every rank."""
    if not engine.is_sharded:
        return stage
    copy_, state = build_stage(StageName(stage.name), config, engine.device), stage.state_dict()
    copy_.module.load_state_dict(engine.backend.full(stage.module.state_dict()))
    for name, tensor in copy_.state_dict().items():  # one after another; without the averages of an EMA profile
        tensor.copy_(engine.backend.full({name: state[name]})[name])
    return copy_


def _validate(stage: Stage, config: Config, engine: Engine, give_up: Callable[[], bool]) -> dict[str, float]:
    """The teacher's score in mid-training: with the fewest denoising steps where there is a denoiser."""
    model = _whole_stage(stage, config, engine).models()["teacher"]
    num_steps = min(config.inference.num_steps) if model.denoiser is not None else 0
    predict = predict_function(model, num_steps=num_steps, seed=config.seed)
    return {"miou": evaluate_predictor(predict, config, engine, give_up=give_up).miou}


def _load_initial(model: ICCLD, folder: Path) -> None:
    initial = ICCLD.from_pretrained(folder, num_classes=model.num_classes, with_denoiser=False)
    try:
        model.load_state_dict(initial.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"initial_model={folder} is another model than `model` describes; "
            f"use the model settings that it was trained with. {str(error).splitlines()[1].strip()}"
        ) from error


def _about(stage: Stage, config: Config, stream: TrainingStream) -> Mapping[str, Any]:
    resolved = to_dict(config)
    model = {part: value for part, value in resolved["model"].items() if part != "denoiser"}
    denoiser = {key: value for key, value in resolved["model"]["denoiser"].items() if key != "activation_checkpointing"}
    return {
        "version": __version__,
        "stage": stage.name,
        "model": model | {"denoiser": denoiser},
        "data": stream.fingerprints(),
        "origin": handed_over(config)[1].model_sha256 if stage.name == "stage2" else config.initial_model,
        "rebuilding_config": stage.models()["student"].rebuilding_config(),
        "config": resolved,
    }


def _first_batches(name: StageName, config: Config) -> Iterator[Mapping[str, Any]]:
    """The stream's first samples, in batches that do not depend on the run's layout."""
    layout = BatchLayout(global_batch_size=4, micro_batch_size=4, num_accumulation=1, rank=0, world_size=1)
    return islice(_stream(name, config, layout).batches(0), -(-config.statistics_samples // 4))
