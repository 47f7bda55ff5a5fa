"""The sizes at which bench_train.py measures, and what is built at one: stages with fresh weights, random batches."""

from dataclasses import dataclass
from typing import Any

import torch

from iccld.batch_layout import BatchLayout
from iccld.config import Config, load_config
from iccld.models.iccld import ICCLD
from iccld.programs.run.building import noise_of
from iccld.programs.run.synthetic import synthetic_batch
from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure.profiling import PhaseTimer
from iccld.stages.adversarial import AdversarialStage, new_discriminator
from iccld.stages.base import Stage
from iccld.stages.segmentation import SegmentationStage
from iccld.trainer import TrainingStep, attach

NUM_CLASSES = 19
STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class Size:
    """`model`: overrides of the packaged config; `crop`: side in pixels; `batch_size`: of each domain, a rank.

    `rounds`: turns of each contender; `ranks_batch_size`: as `batch_size`, in the scaling part; `steps`: of the runs on
    real shards, whose scenes are `scenes` images of `crop` x twice that.
    """

    model: tuple[str, ...]
    crop: int
    batch_size: int
    rounds: int
    ranks_batch_size: int
    steps: int
    scenes: int


def _segformer(depths: str, hidden_sizes: str, heads: str) -> tuple[str, ...]:
    backbone = f"model_type: segformer, depths: {depths}, hidden_sizes: {hidden_sizes}, num_attention_heads: {heads}"
    return ("model=mit_b5", "model.encoder.pretrained=", f"+model.encoder.backbone_config={{{backbone}}}")


def _denoiser(width: int, head_dim: int) -> tuple[str, ...]:
    return (f"model.denoiser.width={width}", f"model.denoiser.head_dim={head_dim}")


SIZES = {
    "toy": Size(("model=tiny",), crop=64, batch_size=2, rounds=2, ranks_batch_size=2, steps=16, scenes=12),
    "cpu": Size(
        (
            *_segformer("[2, 2, 2, 2]", "[32, 64, 160, 256]", "[1, 2, 5, 8]"),  # MiT-B0
            *("model.encoder.width=96", "model.decoder.width=96", "model.discriminator.width=32"),
            *_denoiser(96, 32),
        ),
        crop=128,
        batch_size=2,
        rounds=9,
        ranks_batch_size=32,  # as many pixels as in the published 2 crops of 512 x 512
        steps=120,
        scenes=64,
    ),
    "gpu": Size(
        (*_segformer("[3, 6, 40, 3]", "[64, 128, 320, 512]", "[1, 2, 5, 8]"), *_denoiser(352, 64)),
        crop=512,
        batch_size=8,
        rounds=15,
        ranks_batch_size=8,
        steps=100,
        scenes=256,
    ),
}


def config_of(size: Size, *overrides: str) -> Config:
    """Settings of that size; stage 2 is the paper's, as the peers are."""
    return load_config([*size.model, "stage2=paper", f"data.crop_size=[{size.crop},{size.crop}]", *overrides])


def make_stage(name: str, config: Config, device: torch.device) -> Stage:
    """The stage as a run begins it, but E and D of stage 2 untrained. The same weights at every call."""
    torch.manual_seed(config.seed)
    if name == "stage1":
        model = ICCLD(config=config.model, num_classes=NUM_CLASSES, with_denoiser=False).to(device)
        return SegmentationStage(model, config.stage1.objective, seed=config.seed)
    model = ICCLD(config=config.model, num_classes=NUM_CLASSES).to(device)
    discriminator = new_discriminator(model, config.stage2.objective, config.model.discriminator)
    return AdversarialStage(model, discriminator.to(device), config.stage2.objective, seed=config.seed)


def random_batch(size: Size, *, first: int = 0, stage: str | None = None) -> dict[str, Any]:
    """A training batch as the stream gives it, on the host; without the noise of a `stage`, it draws its own."""
    config = config_of(size)
    noise = noise_of(stage, config) if stage else {}
    return synthetic_batch(config, range(first, first + size.batch_size), noise=noise)


class Ours:
    """A stage's step, called as the trainer calls it."""

    def __init__(self, stage: Stage, engine: Engine, batch: dict[str, Any]) -> None:
        self.stage, self.engine, self.step = stage, engine, 0
        self.batch = next(engine.prefetch(iter([batch])))
        size = len(batch["source"]["numbers"])
        ranks = engine.ranks
        layout = BatchLayout(size * ranks.world_size, size, world_size=ranks.world_size, rank=ranks.rank)
        attach(stage, engine, layout)
        self.train = TrainingStep(stage, engine, PhaseTimer(engine.device))

    def __call__(self) -> None:
        self.engine.set_learning_rate(1.0)
        self.train([self.batch], self.step)
        self.train.timer.end_step()
        self.train.timer.take()
        self.step += 1
