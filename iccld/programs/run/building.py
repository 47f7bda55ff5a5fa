"""Building of the parts of a stage's training: its model, its stream, its trials of a micro-batch size."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from iccld.batch_layout import BatchLayout
from iccld.config import Config, stage_settings, trainer_settings
from iccld.data.stream.stream import TrainingStream
from iccld.models.iccld import ICCLD
from iccld.programs.run.hand_off import handed_over
from iccld.programs.run.micro_batch import Trials
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.watchdog import Watchdog
from iccld.stages.base import Stage
from iccld.stages.kind import StageSettings
from iccld.stages.table import STAGES


def build_stream(name: str, config: Config, layout: BatchLayout, *, with_noise: bool = True) -> TrainingStream:
    kind, settings = STAGES[name], stage_settings(name, config)
    cache = kind.cache(settings)
    return TrainingStream(
        config.data,
        seed=config.seed,
        layout=layout,
        with_target=kind.reads_target(settings),
        target_labels=kind.reads_target_labels(settings),
        noise=noise_of(name, config) if with_noise else {},
        repeat_after=cache.num_samples if cache else 0,
    )


def noise_of(name: str, config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes, by purpose, of the noise that the stage adds to a micro-batch's latents or images."""
    return STAGES[name].noise(stage_settings(name, config))


def build_stage(name: str, config: Config, device: torch.device) -> Stage:
    """Build the stage with its model on the device, from what the stage before it left, if there is one."""
    return _build(name, stage_settings(name, config), config, device)


def filled_stage(name: str, config: Config, device: torch.device) -> Stage:
    """Build the stage as `build_stage` does, to be filled with a checkpoint's weights: it downloads none."""
    return _build(name, replace(stage_settings(name, config), is_filled=True), config, device)


def fresh_stage(name: str, config: Config, device: torch.device) -> Stage:
    """Build the stage as `build_stage` does, without what the one before it left: to measure, not to learn."""
    torch.manual_seed(config.seed)
    return STAGES[name].build(stage_settings(name, config), None, device=device)


def _build(name: str, settings: StageSettings[Any], config: Config, device: torch.device) -> Stage:
    torch.manual_seed(config.seed)
    kind, previous = STAGES[name], None
    if kind.previous:
        previous = ICCLD.from_pretrained(handed_over(kind.previous, config)[0], num_classes=settings.num_classes)
    return kind.build(settings, previous, device=device)


def whole_stage(stage: Stage, config: Config, engine: Engine) -> Stage:
    """Return the stage or, if ranks hold shards, one like it with the whole weights. Call on every rank."""
    return gathered(stage, stage_for_whole_weights(stage, config, engine), engine)


def stage_for_whole_weights(stage: Stage, config: Config, engine: Engine) -> Stage:
    """Return the stage or, if ranks hold shards, one like it that `gathered` fills. Ranks exchange nothing."""
    return build_stage(stage.name, config, engine.device) if engine.is_sharded else stage


def gathered(stage: Stage, into: Stage, engine: Engine) -> Stage:
    """Fill `into` with the stage's whole weights, one after another, unless it is the stage. Call on every rank."""
    if into is stage:
        return stage
    for whole, held in ((into.module.state_dict(), stage.module.state_dict()), (into.state_dict(), stage.state_dict())):
        for name, tensor in whole.items():  # without the averages of an EMA profile
            tensor.copy_(engine.backend.full({name: held[name]})[name])
    return into


def first_batches(name: str, config: Config) -> Iterator[Mapping[str, Any]]:
    """Return the stream's first samples, without noise, in batches that do not depend on the run's layout."""
    layout = BatchLayout(global_batch_size=4, micro_batch_size=4)
    stream = build_stream(name, config, layout, with_noise=False)
    return islice(stream.batches(0), -(-config.statistics_samples // 4))


def trials_of(name: str, config: Config, engine: Engine, watchdog: Watchdog) -> Trials:
    """Make the trials of micro-batch sizes, each on a stage and a stream of its own."""
    without_workers = replace(config, data=replace(config.data, num_workers=0))

    def first_samples(size: int) -> Mapping[str, Any]:
        ranks = engine.ranks
        layout = BatchLayout(size * ranks.world_size, size, world_size=ranks.world_size, rank=ranks.rank)
        with closing(build_stream(name, without_workers, layout).batches(0)) as batches:
            return next(batches)

    def build() -> Stage:
        return build_stage(name, config, engine.device)

    return Trials(trainer_settings(name, config), config, engine, watchdog, build, first_samples)
