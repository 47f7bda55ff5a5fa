"""Averaged predictions: over noises, and with the map of stage 1."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iccld.config import load_config
from iccld.programs.evaluate.evaluate import score_model
from iccld.programs.evaluate.results import about_of
from iccld.stages.predictor import InferenceConfig, predictor_of
from tests.models.factory import trained_model

IMAGES, NUMBERS = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 5])


def logits_of(model: Any, *, noise_seed: int = 0, **averaging: Any) -> torch.Tensor:
    with torch.no_grad():
        predict = predictor_of(model, InferenceConfig(**averaging), seed=0, num_steps=2, noise_seed=noise_seed)
        return predict(IMAGES, NUMBERS)


def test_probabilities_are_averaged_over_noises_that_no_other_seed_has():
    model = trained_model()
    single = [logits_of(model, noise_seed=i) for i in range(6)]
    for seed in range(2):
        averaged = logits_of(model, noise_seed=seed, num_averaged=3)
        of_seed = torch.stack([logits.softmax(1) for logits in single[3 * seed : 3 * seed + 3]])
        torch.testing.assert_close(averaged.exp(), of_seed.mean(0))


@pytest.mark.parametrize("blend", [0.25, 1.0])
def test_the_map_of_stage_1_has_its_share(blend: float):
    model = trained_model()
    with torch.no_grad():
        expected = (1 - blend) * logits_of(model).softmax(1) + blend * model.segment(IMAGES).softmax(1)
    torch.testing.assert_close(logits_of(model, blend=blend).exp(), expected)


def test_a_deterministic_model_has_nothing_to_average():
    model = trained_model()
    model.deterministic = True
    assert torch.equal(logits_of(model, num_averaged=4, noise_seed=2), logits_of(model))


def test_a_deterministic_models_scores_are_those_of_its_one_step_and_not_of_the_decoder_alone():
    model = trained_model()
    model.deterministic = True
    config = load_config(["model=tiny", "dataset=scenes", "inference.num_steps=[0,1,4]"])

    def score(predict: Callable[..., torch.Tensor]) -> Any:
        total = float(predict(IMAGES, NUMBERS).abs().sum())
        return SimpleNamespace(miou=total, to_json=lambda: {"miou": total})

    with torch.no_grad():
        scores = score_model(model, config, score)["stage2"]
    assert scores["1"] == scores["4"] != scores["0"]


def test_what_is_averaged_is_told_with_the_scores_and_only_then():
    usual, averaged = (
        about_of([], load_config(["model=tiny", "dataset=scenes", *words]))
        for words in ([], ["inference.num_averaged=4", "inference.blend=0.5"])
    )
    assert averaged == {**usual, "num_averaged": 4, "blend": 0.5} and not {"num_averaged", "blend"} & usual.keys()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("inference.num_averaged=0", r"inference.num_averaged=0 must be at least 1"),
        ("inference.blend=1.5", r"inference.blend=1.5 must be between 0"),
    ],
)
def test_settings_out_of_range_are_refused(word: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_config([word])
