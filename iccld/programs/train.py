"""`iccld train`: the stages of a run, one after the other, each from where it stopped; then their scores.

Killed anywhere, the same command goes on: within a stage from its newest whole checkpoint, between the stages from what
the first left (`hand_off`).
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from iccld import __version__
from iccld.config import Config, StageName, differences, read_config, to_dict, to_yaml
from iccld.data.config import BatchLayout
from iccld.data.stream import TrainingStream, read_validation
from iccld.models.attention import check_backend
from iccld.models.discriminator import Discriminator
from iccld.models.iccld import ICCLD
from iccld.programs.ema import write_due_snapshot
from iccld.programs.evaluate import (
    evaluate_models,
    evaluate_predictor,
    finished_models,
    predict_function,
    unscored_stages,
)
from iccld.programs.hand_off import final_folder, hand_over, handed_over, is_finished
from iccld.runtime.checkpoint import CheckpointStore
from iccld.runtime.durable import write_text_durably
from iccld.runtime.engine import Engine
from iccld.runtime.lock import locked
from iccld.runtime.metrics import MetricsLogger
from iccld.runtime.preemption import Preemption
from iccld.stages.adversarial import AdversarialStage, AdversaryInput
from iccld.stages.base import Stage
from iccld.stages.segmentation import SegmentationStage
from iccld.trainer import Trainer, TrainerConfig


def train(config: Config) -> bool:
    """Run the configured stages; False if a signal ended the run early. Call on every rank."""
    preemption = Preemption().install()
    run_dir = Path(config.run_dir)
    with Engine(config.engine) as engine, locked(run_dir) if engine.is_main else nullcontext("") as holder:
        _check_alone(run_dir, holder, engine)
        _check_settings(config, engine)
        _check_run_dir(run_dir, config, engine)
        for name in config.stages:
            if is_finished(run_dir, name):
                if engine.is_main:
                    print(f"{name.value} is finished: {final_folder(run_dir, name)}", flush=True)
            elif not _run_stage(name, config, engine, preemption):
                return False
        preemption.remove()  # nothing more is lost by ending at once
        if config.data.validation.shards and unscored_stages(config):
            evaluate_models(finished_models(config), config, engine)
    return True


def _check_alone(run_dir: Path, holder: str, engine: Engine) -> None:
    holder = engine.gather_objects(holder)[0]
    if holder:
        raise ValueError(f"run_dir={run_dir} is in use by {holder}; wait for it, end it, or use another run_dir.")


def _check_settings(config: Config, engine: Engine) -> None:
    """Whatever a later stage would stumble over, before time is spent on an earlier one."""
    for name in config.stages:
        _plan(name, config).num_accumulation(engine.world_size)
    if StageName.stage2 in config.stages:
        check_backend(config.model.denoiser.attention, engine.device.type)
    class_set = config.data.class_set.build()
    class_set.subset(config.evaluation.num_classes or class_set.num_classes)
    if config.data.validation.shards:
        read_validation(config.data)
    elif any(_plan(name, config).evaluate_every for name in config.stages):
        raise ValueError(
            "trainer.evaluate_every is set, but data.validation.shards is empty; set it, or evaluate_every=0."
        )
    if engine.is_sharded and StageName.stage1 in config.stages and not config.stage1.objective.use_teacher:
        raise ValueError(
            "stage1.objective.use_teacher=false asks the student for pseudo-labels, which FSDP2 holds in shards; "
            "launch with ddp, zero1 or zero2."
        )
    if not config.data.target.shards and (config.stage1.objective.adapt or StageName.stage2 in config.stages):
        raise ValueError(
            "data.target.shards is empty, but adaptation needs target images; set it, or use stage=source_only."
        )


def _check_run_dir(run_dir: Path, config: Config, engine: Engine) -> None:
    """A run directory belongs to one config, but for the settings of a stage that has not begun."""
    path = run_dir / "config.yaml"
    if path.exists() and any((run_dir / stage.value).exists() for stage in StageName):
        unbegun = tuple(f"{stage.value}." for stage in StageName if not (run_dir / stage.value).exists())
        changed = [change for change in differences(read_config(path), config) if not change.startswith(unbegun)]
        if changed:
            raise ValueError(
                f"run_dir={run_dir} holds a run of another config ({'; '.join(changed[:5])}); "
                f"use another run_dir, or the settings in {path}."
            )
    engine.barrier()  # nobody writes before all have compared
    if engine.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text_durably(path, to_yaml(config))
    engine.barrier()


def _run_stage(name: StageName, config: Config, engine: Engine, preemption: Preemption) -> bool:
    plan = _plan(name, config)
    layout = BatchLayout(
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        num_accumulation=plan.num_accumulation(engine.world_size),
        rank=engine.rank,
        world_size=engine.world_size,
    )
    stream = _stream(name, config, layout)
    stage = build_stage(name, config, engine.device)
    folder = Path(config.run_dir) / name.value
    metrics = _metrics(name, config, engine)
    finished = Trainer(
        stage=stage,
        stream=stream,
        engine=engine,
        checkpoints=CheckpointStore(
            folder / "checkpoints",
            plan.checkpoint,
            engine,
            announce=lambda step: metrics.event("saved", step=step),
        ),
        metrics=metrics,
        preemption=preemption,
        config=plan,
        about=_about(name, config, stream),
        evaluate=lambda: _validate(stage, config, engine),
        after_step=lambda step: write_due_snapshot(stage, folder / "ema", engine, num_steps=step + 1),
    ).run()
    if finished:
        stage = _whole_stage(stage, config, engine)
        if engine.is_main:
            stage.finish(_first_batches(name, config))
            hand_over(stage, config, step=plan.num_steps)
        engine.barrier()
        metrics.event("finished", step=plan.num_steps)
    metrics.close()
    return finished


def _metrics(name: StageName, config: Config, engine: Engine) -> MetricsLogger:
    return MetricsLogger(
        Path(config.run_dir),
        config.metrics,
        stage=name.value,
        is_main=engine.is_main,
        world_size=engine.world_size,
        sum_values=engine.sum_values,
    )


def _plan(name: StageName, config: Config) -> TrainerConfig:
    return config.stage1.trainer if name is StageName.stage1 else config.stage2.trainer


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
    module, state = engine.backend.full(stage.module.state_dict()), engine.backend.full(stage.state_dict())
    copy_ = build_stage(StageName(stage.name), config, engine.device)
    copy_.module.load_state_dict(module)
    for name, tensor in copy_.state_dict().items():
        tensor.copy_(state[name])
    return copy_


def _validate(stage: Stage, config: Config, engine: Engine) -> dict[str, float]:
    """The teacher's score in mid-training: with the fewest denoising steps where there is a denoiser."""
    model = _whole_stage(stage, config, engine).models()["teacher"]
    num_steps = min(config.inference.num_steps) if model.denoiser is not None else 0
    predict = predict_function(model, num_steps=num_steps, seed=config.seed)
    return {"miou": evaluate_predictor(predict, config, engine).miou}


def _load_initial(model: ICCLD, folder: Path) -> None:
    initial = ICCLD.from_pretrained(folder, num_classes=model.num_classes, with_denoiser=False)
    try:
        model.load_state_dict(initial.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"initial_model={folder} is another model than `model` describes; "
            f"use the model settings that it was trained with. {str(error).splitlines()[1].strip()}"
        ) from error


def _about(name: StageName, config: Config, stream: TrainingStream) -> Mapping[str, Any]:
    resolved = to_dict(config)
    model = {part: value for part, value in resolved["model"].items() if part != "denoiser"}
    denoiser = {key: value for key, value in resolved["model"]["denoiser"].items() if key != "activation_checkpointing"}
    return {
        "version": __version__,
        "stage": name.value,
        "model": model | {"denoiser": denoiser},
        "data": stream.fingerprints(),
        "origin": handed_over(config)[1].model_sha256 if name is StageName.stage2 else config.initial_model,
        "config": resolved,
    }


def _first_batches(name: StageName, config: Config) -> Iterator[Mapping[str, Any]]:
    """The stream's first samples, in batches that do not depend on the run's layout."""
    layout = BatchLayout(global_batch_size=4, micro_batch_size=4, num_accumulation=1, rank=0, world_size=1)
    return islice(_stream(name, config, layout).batches(0), -(-config.statistics_samples // 4))
