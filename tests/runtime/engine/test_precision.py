"""Precision of what runs beside the engine's module: a stage's `prepare`, and scoring."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from iccld.config import load_config
from iccld.programs.evaluate.scoring import evaluate_predictor
from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure.profiling import PhaseTimer
from iccld.runtime.settings import EngineConfig, Precision
from iccld.stages.base import StageInputs
from iccld.trainer import TrainingStep
from tests.factory import scene_overrides

SEEN = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def precision_here() -> torch.dtype:
    """The dtype that a product of two fp32 matrices has here."""
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize("precision", SEEN)
def test_preparing_and_scoring_run_in_the_engines_precision(precision: Precision, scene_shards: Path, tmp_path: Path):
    config = load_config([*scene_overrides(scene_shards, tmp_path), "evaluation.max_images=1"])
    seen: dict[str, torch.dtype] = {}

    class Prepared(Exception):
        """The stage has seen what it was to see."""

    class Stage:
        def prepare(self, *_: Any) -> StageInputs:
            seen["prepare"] = precision_here()
            raise Prepared

    def predict(images: Tensor, numbers: Tensor) -> Tensor:
        seen["predict"] = precision_here()
        return torch.zeros(len(images), 19, *images.shape[-2:])

    with Engine(EngineConfig(precision=precision)) as engine:
        with pytest.raises(Prepared):
            TrainingStep(Stage(), engine, PhaseTimer(engine.device))([{}], 0)  # type: ignore[arg-type]
        evaluate_predictor(predict, config, engine)
    assert seen == dict.fromkeys(("prepare", "predict"), SEEN[precision])
    assert precision_here() is torch.float32


def test_a_launch_in_another_precision_than_the_experiments_is_refused(monkeypatch: pytest.MonkeyPatch):
    for launched in ("bf16", "fp16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        with pytest.raises(ValueError, match=f"mixed_precision={launched} of .* must be engine.precision=fp32, which"):
            Engine(EngineConfig())
    for launched in ("bf16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        with Engine(EngineConfig(precision=Precision.bf16)) as engine, engine.autocast():
            assert precision_here() is torch.bfloat16
