"""What a stage's training is made of: its model, its stream, its part of the batch."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from iccld.batch_layout import BatchLayout
from iccld.config import Config, StageName
from iccld.data.stream.stream import TrainingStream
from iccld.models.blocks import LATENT_STRIDE
from iccld.models.iccld import ICCLD
from iccld.models.latent import LatentKind
from iccld.programs.run.checks import plan_of
from iccld.programs.run.hand_off import handed_over
from iccld.programs.run.micro_batch import Trials
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.watchdog import Watchdog
from iccld.stages import segmentation
from iccld.stages.adversarial import AdversarialStage, new_discriminator, noise_shapes
from iccld.stages.base import Stage
from iccld.stages.segmentation import SegmentationStage
from iccld.stages.views import CORRUPTION_NOISE


def build_stream(name: StageName, config: Config, layout: BatchLayout) -> TrainingStream:
    return TrainingStream(
        config.data,
        seed=config.seed,
        layout=layout,
        with_target=name is StageName.stage2 or config.stage1.objective.adapt,
        target_labels=config.stage1.objective.target_labels,
        noise=noise_of(name, config),
        repeat_after=config.stage2.cache.num_samples if name is StageName.stage2 else 0,
    )


def noise_of(name: StageName, config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes, by purpose, of the noise that the stage adds to a micro-batch's latents, or to its images."""
    height, width = (-(-side // LATENT_STRIDE) for side in config.data.crop_size)
    shape = (config.model.latent_channels, height, width)
    if name is StageName.stage2:
        drawn = noise_shapes(config.stage2.objective, latent=shape, crop_size=config.data.crop_size)
        if config.stage2.cache.num_samples:  # a view that repeats has the noise of another number
            drawn.pop(CORRUPTION_NOISE, None)
        return drawn
    noise: dict[str, tuple[int, ...]] = {segmentation.NOISE: shape} if config.model.latent is LatentKind.mask else {}
    if config.stage1.objective.adapt and config.stage1.objective.corruption.strength:
        noise[segmentation.CORRUPTION_NOISE] = (3, *config.data.crop_size)
    return noise


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
    return _second_stage(ICCLD.from_pretrained(handed_over(config)[0], num_classes=num_classes), config, device)


def fresh_stage(name: StageName, config: Config, device: torch.device) -> Stage:
    """As `build_stage`, without what a stage takes from the one before it: to measure, not to learn."""
    if name is StageName.stage1:
        return build_stage(name, config, device)
    torch.manual_seed(config.seed)
    num_classes = config.data.class_set.build().num_classes
    model = ICCLD(config=config.model, num_classes=num_classes, with_denoiser=False)
    return _second_stage(model, config, device)


def _second_stage(model: ICCLD, config: Config, device: torch.device) -> AdversarialStage:
    model.start_denoiser(config.model)
    discriminator = new_discriminator(model, config.stage2.objective, config.model.discriminator)
    return AdversarialStage(model.to(device), discriminator.to(device), config.stage2.objective, seed=config.seed)


def whole_stage(stage: Stage, config: Config, engine: Engine) -> Stage:
    """The stage itself, or, where ranks hold shards, one like it with the whole weights. Call on every rank."""
    if not engine.is_sharded:
        return stage
    copy_, state = build_stage(StageName(stage.name), config, engine.device), stage.state_dict()
    copy_.module.load_state_dict(engine.backend.full(stage.module.state_dict()))
    for name, tensor in copy_.state_dict().items():  # one after another; without the averages of an EMA profile
        tensor.copy_(engine.backend.full({name: state[name]})[name])
    return copy_


def first_batches(name: StageName, config: Config) -> Iterator[Mapping[str, Any]]:
    """The stream's first samples, in batches that do not depend on the run's layout."""
    layout = BatchLayout(global_batch_size=4, micro_batch_size=4)
    return islice(build_stream(name, config, layout).batches(0), -(-config.statistics_samples // 4))


def _load_initial(model: ICCLD, folder: Path) -> None:
    initial = ICCLD.from_pretrained(folder, num_classes=model.num_classes, with_denoiser=False)
    try:
        model.load_state_dict(initial.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"initial_model={folder} is another model than `model` describes; "
            f"use the model settings that it was trained with. {str(error).splitlines()[1].strip()}"
        ) from error


def trials_of(name: StageName, config: Config, engine: Engine, watchdog: Watchdog) -> Trials:
    """How a micro-batch size can be tried: on a stage and a stream of its own."""
    without_workers = replace(config, data=replace(config.data, num_workers=0))

    def first_samples(size: int) -> Mapping[str, Any]:
        ranks = engine.ranks
        layout = BatchLayout(size * ranks.world_size, size, world_size=ranks.world_size, rank=ranks.rank)
        with closing(build_stream(name, without_workers, layout).batches(0)) as batches:
            return next(batches)

    def build() -> Stage:
        return build_stage(name, config, engine.device)

    return Trials(plan_of(name, config), config, engine, watchdog, build, first_samples)
