"""Remedies of an out-of-memory message: only settings that are not set yet, and that the model can do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from iccld.cli import main
from iccld.config import load_config, trainer_settings
from iccld.programs.run.building import fresh_stage
from iccld.programs.run.out_of_memory import remedies
from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import EngineConfig
from tests.factory import scene_overrides

CONVNEXT = (
    "model.encoder.pretrained=",
    "model.encoder.backbone_config={model_type: convnextv2, depths: [1, 1, 1, 1], hidden_sizes: [8, 16, 24, 32]}",
)


@pytest.mark.parametrize(
    ("stage", "settings", "part"),
    [
        ("stage1", [], "encoder"),
        ("stage1", ["model.encoder.activation_checkpointing=true"], ""),
        ("stage1", CONVNEXT, ""),
        ("stage2", [], "denoiser"),
        ("stage2", ["model.denoiser.activation_checkpointing=1"], ""),
    ],
)
def test_activation_checkpointing_is_named_where_it_helps(stage: str, settings: Any, part: str) -> None:
    config = load_config(["model=tiny", *settings])
    with Engine(EngineConfig()) as engine:
        made = fresh_stage(stage, config, torch.device("cpu"))
        found = list(remedies(made, trainer_settings(stage, config).layout(), config, engine, phase="forward"))
    assert [text for text in found if "checkpointing" in text] == (
        [f"model.{part}.activation_checkpointing=true"] if part else []
    )
    assert "engine.precision=bf16" in found


@pytest.mark.parametrize("size", ["1", "auto"])
def test_a_model_for_which_there_is_no_memory_is_refused_in_one_line(
    scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    words = ["model.decoder.width=10000000", f"stage1.trainer.micro_batch_size={size}"]
    assert main(["train", *scene_overrides(scene_shards, tmp_path / "run"), *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("iccld train: out of memory (") and said.endswith("or use a device that has more")
