"""A tiny model learns 8 images by heart from perfect labels without augmentation, in both stages."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.cli import main
from iccld.data.shards.making import MakeShardsConfig, make_shards
from iccld.labels import CITYSCAPES_PALETTE

NUM_STEPS = {"stage1": 80, "stage2": 200}


def draw_blocks(folder: Path) -> None:
    """8 images 64x64 of coloured blocks with noise; each class in its own colour."""
    generator = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for i in range(8):
        labels = generator.integers(0, 5, (4, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        colours = np.array(CITYSCAPES_PALETTE, np.int16)[labels] + generator.integers(-30, 30, (64, 64, 3))
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{i}.png")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perfect")
    draw_blocks(folder / "blocks")
    make_shards(
        MakeShardsConfig(
            dataset="folder", classes="cityscapes", input=str(folder / "blocks"), output=str(folder / "shards")
        )
    )
    settings = [
        "model=tiny",
        "dataset=scenes",
        f"run_dir={folder}/run",
        *(f"data.{part}.shards={folder}/shards" for part in ("source", "target", "validation")),
        "data.class_set.names=[a,b,c,d,e]",
        "+data.class_set.of_train_id={0:0,1:1,2:2,3:3,4:4}",
        "data.crop_size=[64,64]",
        "data.flip=0",
        "data.max_class_share=1",
        "data.num_workers=0",
        "data.rare_class_sampling=false",
        "statistics_samples=8",
        "model.latent_channels=4",
        "metrics.wandb=disabled",
        "metrics.log_every=1",
        "inference.num_steps=[1]",
        "evaluation.diagnostic_images=0",
        "stage2=paper",  # one loss, which can fall to nothing
        "stage1.objective.target_labels=true",
        "stage1.objective.encoder_learning_rate=2e-3",
        "stage1.objective.decoder_learning_rate=2e-3",
        "stage1.objective.teacher_decay=0.9",
        "stage2.objective.learning_rate=4e-3",
        "stage2.objective.teacher_decay=0.9",
    ]
    for stage, num_steps in NUM_STEPS.items():
        settings += [f"{stage}.objective.photometric.{name}_probability=0" for name in ("jitter", "blur")]
        settings += [f"{stage}.trainer.{name}=8" for name in ("global_batch_size", "micro_batch_size")]
        settings += [f"{stage}.trainer.num_steps={num_steps}", f"{stage}.trainer.schedule.warmup_steps=5"]
    assert main(["train", *settings]) == 0
    return folder / "run"


def test_stage_1_learns_8_images_by_heart(run_dir: Path):
    results = json.loads((run_dir / "report/results.json").read_text())
    assert results["stage1"]["miou"] > 95


def test_the_diffusion_loss_falls_below_a_tenth_of_its_start(run_dir: Path):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/diffusion"] for line in lines if line["stage"] == "stage2" and "loss" in line]
    assert np.mean(losses[-20:]) < 0.1 * losses[0]
