"""Averaged predictions: over noises, and with the map of stage 1."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from iccld.cli import main
from iccld.config import load_config
from iccld.models.encoder import EncoderOutput
from iccld.models.settings import LatentKind
from iccld.programs.ablate import pictures
from iccld.programs.evaluate import averaging
from iccld.programs.evaluate.evaluate import score_model
from iccld.programs.evaluate.results import about_of
from iccld.solver import Solver
from iccld.stages.kind import StageKind
from iccld.stages.predictor import predictor_of
from iccld.stages.settings import InferenceConfig
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


def test_a_deterministic_model_has_nothing_to_average_and_no_path_to_choose():
    model = trained_model()
    model.deterministic = True
    assert torch.equal(logits_of(model, num_averaged=4, noise_seed=2), logits_of(model))
    assert torch.equal(logits_of(model, solver=Solver.dpm, start=0.5), logits_of(model))


@pytest.mark.parametrize("latent", LatentKind)
def test_a_start_near_the_end_is_stage_1s_latent(latent: LatentKind):
    """A denoiser that returns what it is given then decodes the guess: at timestep 1, z_t is all but that."""
    model = trained_model(latent=latent)
    model.denoiser = cast("Any", GivesBack())
    encoded = model.encoder(IMAGES)
    guess = encoded.latent
    if model.mask_encoder is not None:
        guess = model.mask_encoder(model.segment(IMAGES).argmax(1))
    expected = model.decode(EncoderOutput(guess, encoded.features), IMAGES.shape[-2:])
    torch.testing.assert_close(logits_of(model, start=0.001), expected, rtol=0.1, atol=0.1)
    assert not torch.allclose(logits_of(model, start=1.0), expected, rtol=0.1, atol=0.1)


class GivesBack(torch.nn.Module):
    """Stands in for the denoiser: predicts z_0 to be z_t."""

    def forward(self, z_t: torch.Tensor, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(z_0_pred=z_t)


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
        for words in (
            [],
            ["inference.num_averaged=4", "inference.blend=0.5", "inference.solver=dpm", "inference.start=0.5"],
        )
    )
    own = {"num_averaged": 4, "blend": 0.5, "solver": "dpm", "start": 0.5}
    assert averaged == {**usual, **own} and not own.keys() & usual.keys()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("inference.num_averaged=0", r"inference.num_averaged=0 must be at least 1"),
        ("inference.blend=1.5", r"inference.blend=1.5 must be between 0"),
        ("inference.start=0", r"inference.start=0.0 must be above 0, and at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(word: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_config([word])


def test_predict_averages_as_the_scores_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, asked = trained_model(), list[InferenceConfig]()
    names, palette = [f"class {i}" for i in range(model.num_classes)], [(i, i, i) for i in range(model.num_classes)]
    model.save_pretrained(tmp_path / "model", class_names=names, palette=palette)
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(tmp_path / "image.png")

    def predictor(self: Any, model: Any, inference: InferenceConfig, **options: Any) -> Any:
        asked.append(inference)
        return predictor_of(model, inference, **options)

    monkeypatch.setattr(StageKind, "predictor", predictor)
    paths = [str(tmp_path / name) for name in ("model", "image.png", "out")]
    words = ["--num-averaged", "3", "--blend", "0.5", "--solver", "dpm", "--start", "0.5"]
    assert not main(["predict", *paths, "--num-steps", "1", *words])
    assert asked == [InferenceConfig(num_averaged=3, blend=0.5, solver=Solver.dpm, start=0.5)]


def test_predict_averages_nothing_without_steps(capsys: pytest.CaptureFixture[str]):
    given = {"--num-averaged": ["--num-averaged", "3"], "--start, --blend": ["--blend", "1", "--start", ".5"]}
    for named, words in given.items():
        assert main(["predict", "model", "image.png", "out", *words]) == 2
        assert f"{named} without --num-steps: nothing is denoised" in capsys.readouterr().err


def test_pictures_and_averages_of_other_widths_are_averaged_as_the_scores_are(monkeypatch: pytest.MonkeyPatch):
    words = ["model=tiny", "dataset=scenes", "inference.num_steps=[2,4]", "inference.num_averaged=3"]
    config, model = load_config(words), trained_model()
    monkeypatch.setattr(pictures, "finished_models", lambda config: [Path("model")])
    monkeypatch.setattr(pictures, "load_matching_model", lambda folder, config: model)
    with torch.no_grad():
        shown = pictures.predictor_of_row(config)(IMAGES, NUMBERS)
        assert torch.equal(shown, logits_of(model, num_averaged=3))
        monkeypatch.setattr(averaging, "evaluate_predictor", lambda predict, *_: predict(IMAGES, NUMBERS))
        swept = averaging.scores_by_steps(model, config, SimpleNamespace())  # pyright: ignore[reportArgumentType]
    assert list(swept) == [2, 4] and torch.equal(swept[2], shown)  # pyright: ignore[reportArgumentType]
