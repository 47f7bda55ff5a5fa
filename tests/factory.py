"""Parts that several tests share: a tiny model, random batches, and the embedded data set in shards."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from iccld.batch_layout import BatchLayout
from iccld.config import Config, load_config
from iccld.models.settings import LatentKind, ModelConfig
from iccld.runtime.engine.engine import Engine
from iccld.stages.settings import AdversarialConfig


def layout_for(engine: Engine, num_accumulation: int) -> BatchLayout:
    """A batch of single samples: so many micro-batches a rank."""
    ranks = engine.ranks
    return BatchLayout(num_accumulation * ranks.world_size, 1, world_size=ranks.world_size, rank=ranks.rank)


def tiny_model_config(*, latent: LatentKind = LatentKind.image) -> ModelConfig:
    """The packaged tiny model, smaller still, with the paper's condition."""
    config = _tiny().model
    config.latent = latent
    return config


def papers_objective(**settings: Any) -> AdversarialConfig:
    """The paper's objective of stage 2, but for `settings`."""
    return replace(_tiny().stage2.objective, **settings)


def _tiny() -> Config:
    return copy.deepcopy(_composed())


@cache
def _composed() -> Config:
    sizes = ("model.latent_channels=4", "model.denoiser.width=16", "model.discriminator.width=8")
    return load_config(["model=tiny", "stage2=paper", *sizes])


def random_batch(*, num_classes: int, numbers: Iterable[int], height: int = 32, width: int = 64) -> dict[str, Any]:
    """A training batch of random images; a sample depends on its number alone."""
    ids = list(numbers)
    batch: dict[str, Any] = {}
    for name, offset in (("source", 0), ("target", 1_000_000)):
        generators = [torch.Generator().manual_seed(offset + n) for n in ids]
        images = [torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8) for g in generators]
        coarse = [torch.randint(0, num_classes, (height // 8, width // 8), generator=g) for g in generators]
        labels = [c.repeat_interleave(8, 0).repeat_interleave(8, 1).to(torch.uint8) for c in coarse]
        batch[name] = {
            "images": torch.stack(images),
            "valid": torch.ones(len(ids), height, width, dtype=torch.bool),
            "numbers": torch.tensor(ids),
            "keys": [f"{name}{n}" for n in ids],
        }
        if name == "source":
            batch[name]["labels"] = torch.stack(labels)
    return batch


def make_scene_shards(folder: Path) -> None:
    """64x128 scenes through the converters of the real sets: 16 source, 16 target (with and without labels), 5
    validation.
    """
    from iccld.data.shards.making import MakeShardsConfig, make_shards
    from iccld.demo.scenes import write_cityscapes, write_gta5

    write_gta5(folder / "gta5", count=16, seed=0, height=64, width=128)
    write_cityscapes(folder / "cityscapes", train=16, val=5, seed=0, height=64, width=128)
    for name, dataset, split, labels in (
        ("source", "gta5", "", True),
        ("target", "cityscapes", "train", False),
        ("target_labelled", "cityscapes", "train", True),
        ("validation", "cityscapes", "val", True),
    ):
        make_shards(
            MakeShardsConfig(
                dataset=dataset,
                input=str(folder / ("gta5" if dataset == "gta5" else "cityscapes")),
                output=str(folder / name),
                split=split,
                no_labels=not labels,
                samples_per_shard=6,
            )
        )


def scene_overrides(shards: Path, run_dir: Path) -> list[str]:
    """A run of a few steps on the shards of `make_scene_shards`."""
    return [
        "model=tiny",
        "dataset=scenes",
        f"run_dir={run_dir}",
        f"data.source.shards={shards}/source",
        f"data.target.shards={shards}/target",
        f"data.validation.shards={shards}/validation",
        "data.crop_size=[48,64]",
        "data.num_workers=0",
        "data.rare_class_min_pixels=20",
        "model.latent_channels=4",
        "model.residual_steps=2",
        "model.denoiser.width=16",
        "model.discriminator.width=8",
        "metrics.wandb=disabled",
        "metrics.log_every=1",
        "evaluation.diagnostic_images=0",
        "statistics_samples=4",
        "stage1.trainer.schedule.warmup_steps=2",
        "stage2.trainer.schedule.warmup_steps=2",
    ]
