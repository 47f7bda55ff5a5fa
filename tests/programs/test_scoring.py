"""Scoring tells, before each image, how far it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iccld.config import Config, load_config
from iccld.programs.evaluate.scoring import diagnose_model, evaluate_predictor
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.preemption import Preempted
from tests.factory import scene_overrides
from tests.models.factory import trained_model


@pytest.fixture
def config(scene_shards: Path, tmp_path: Path) -> Config:
    config = load_config(scene_overrides(scene_shards, tmp_path))
    return replace(config, evaluation=replace(config.evaluation, max_images=3, diagnostic_images=2))


def test_each_image_is_counted_and_the_end(config: Config):
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> bool:
        told.append((done, total))
        return False

    with Engine(config.engine) as engine:
        evaluate_predictor(lambda images, _: torch.zeros(len(images), 19, 8, 8), config, engine, give_up=tell)
        assert told == [(0, 3), (1, 3), (2, 3), (3, 3), (3, 3)]
        told.clear()
        diagnose_model(trained_model(num_classes=19), config, engine, with_bounds=False, give_up=tell)
        assert told == [(0, 2), (1, 2), (2, 2)]


def test_what_is_given_up_after_an_image_scores_no_other(config: Config):
    seen: list[int] = []

    def predict(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        seen.extend(numbers.tolist())
        return torch.zeros(len(images), 19, 8, 8)

    with Engine(config.engine) as engine, pytest.raises(Preempted):
        evaluate_predictor(predict, config, engine, give_up=lambda done, total: done >= 1)
    assert seen == [0]
