"""bf16 autocast and torch.compile are settings: both stages train with them, close to what they are without."""

import json
from pathlib import Path

import pytest

from iccld.cli import main
from tests.factory import scene_overrides


def losses(shards: Path, run_dir: Path, *settings: str) -> list[float]:
    steps = [f"stage{i}.trainer.num_steps=3" for i in (1, 2)]
    overrides = [*scene_overrides(shards, run_dir), *steps, "data.validation.shards=", *settings]
    assert main(["train", *overrides]) == 0
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def exact(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that all others are compared with."""
    return losses(scene_shards, tmp_path_factory.mktemp("exact") / "run")


def test_bf16_trains_both_stages_with_fp32_weights(scene_shards: Path, tmp_path: Path, exact: list[float]):
    autocast = losses(scene_shards, tmp_path / "bf16", "engine.precision=bf16")
    assert autocast != exact
    assert autocast == pytest.approx(exact, rel=0.05)


def test_activation_checkpointing_changes_no_loss(scene_shards: Path, tmp_path: Path, exact: list[float]):
    settings = [f"model.{part}.activation_checkpointing=true" for part in ("encoder", "denoiser")]
    recomputed = losses(scene_shards, tmp_path / "recomputed", *settings)
    assert recomputed == pytest.approx(exact, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_compiled_stages_train_alike(how: str, scene_shards: Path, tmp_path: Path, exact: list[float]):
    compiled = losses(scene_shards, tmp_path / "compiled", f"engine.compile={how}")
    assert compiled == pytest.approx(exact, rel=1e-3)
