"""`ICCLD.from_pretrained(source).predict(images)`: sources, images, results, and what is refused."""

import json
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iccld import ICCLD
from iccld.inference.model import ICCLD as Model
from iccld.solver import Solver
from iccld.stages.settings import InferenceConfig
from tests.models.factory import tiny_model, trained_model

NAMES = ["kerb", "sky", "cart", "pole", "person"]
PALETTE = [(10 * i, 20 * i, 30 * i) for i in range(5)]
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def save(model, folder: Path) -> Path:
    origin = {"data": {"source": ["renderings"]}, "run_dir": "/private/runs/street"}
    model.save_pretrained(folder, class_names=NAMES, palette=PALETTE, origin=origin)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(trained_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return ICCLD.from_pretrained(folder)


def test_importing_the_package_imports_no_torch():
    words = "import iccld, sys; assert iccld.__version__ and 'torch' not in sys.modules and 'ICCLD' in iccld.__all__"
    subprocess.run([sys.executable, "-c", words], check=True)


def test_every_kind_of_image_gives_the_same_result(model: Model, tmp_path: Path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    kinds = [PIXELS, Image.fromarray(PIXELS), PIXELS.astype(np.float64) / 255, tensor, tensor.float() / 255]
    expected, *others = (model.predict(image, num_steps=2) for image in kinds)
    for other in others:
        np.testing.assert_allclose(other.probabilities, expected.probabilities, atol=1e-5)
        assert (other.image == PIXELS).all()
    by_path = [model.predict(path) for path in (tmp_path / "a.png", str(tmp_path / "a.png"))]
    assert all((result.labels == model.predict(PIXELS).labels).all() for result in by_path)


def test_several_images_give_a_list_alike_alone_and_together(model: Model):
    other = np.ascontiguousarray(PIXELS[::-1])
    together = model.predict([PIXELS, Image.fromarray(other)], num_steps=1)
    batch = model.predict(torch.from_numpy(np.stack([PIXELS, other])).permute(0, 3, 1, 2), num_steps=1)
    assert isinstance(batch, list) and len(together) == len(batch) == 2
    for result, same, image in zip(together, batch, (PIXELS, other), strict=True):
        alone = model.predict(image, num_steps=1)
        assert (result.probabilities == alone.probabilities).all() and (same.labels == alone.labels).all()


def test_the_result_is_what_it_says(model: Model):
    result = model.predict(PIXELS, num_steps=1, seeds=3)
    assert result.labels.shape == (40, 56) and result.labels.dtype == np.uint8
    assert result.names == NAMES and [*result.colours] == PALETTE
    probabilities = result.probabilities
    assert probabilities.shape == (5, 40, 56) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    assert (result.labels == probabilities.argmax(0)).all()
    entropy = -(probabilities * np.log(probabilities)).sum(0) / np.log(5)
    np.testing.assert_allclose(result.uncertainty, entropy, atol=1e-4)
    assert (result.disagreement > 0).any() and (result.disagreement <= result.uncertainty + 1e-5).all()
    assert not model.predict(PIXELS, num_steps=1).disagreement.any()
    mean = (PIXELS.astype(int) + np.array(PALETTE)[result.labels]) / 2
    assert np.abs(np.asarray(result.overlay()) - mean).max() <= 0.5


def test_a_result_is_shown_in_a_line(model: Model):
    shown = repr(model.predict(np.zeros((32, 48, 3), np.uint8)))
    assert shown.startswith("Prediction(32x48 pixels; classes: ") and "\n" not in shown and len(shown) < 300


def test_forward_gives_the_logits_that_predict_reads(model: Model):
    images = torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (1, 5, 40, 56)
    np.testing.assert_allclose(model.predict(PIXELS).probabilities, logits.softmax(1)[0].numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="give noise"):
        model(images, num_steps=2)


def test_a_size_a_window_and_a_precision_change_the_pass_alone(model: Model):
    for options in ({"size": (64, 96)}, {"sliding_window": True}, {"precision": "bf16"}, {"device": "cpu"}):
        assert model.predict(PIXELS, **options).labels.shape == (40, 56)
    assert not np.array_equal(model.predict(PIXELS, size=(64, 96)).probabilities, model.predict(PIXELS).probabilities)


def test_results_are_saved_as_labels_or_probabilities(model: Model, tmp_path: Path):
    result = model.predict(PIXELS)
    result.save(tmp_path / "a.png")
    result.save(tmp_path / "a.npz")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P" and (np.array(picture) == result.labels).all()
        assert picture.getpalette()[:15] == [part for colour in PALETTE for part in colour]
    saved = np.load(tmp_path / "a.npz")
    assert saved["names"].tolist() == NAMES and saved["probabilities"].shape == (5, 40, 56)
    with pytest.raises(ValueError, match=r"must end in .png .labels. or .npz"):
        result.save(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (PIXELS.astype(np.float32), r"from 0 to 255 must lie in \[0, 1\]; divide by 255"),
        (PIXELS.astype(np.float32) / 127.5 - 1, "before it is normalised"),
        (np.full((8, 8, 3), np.nan), "must lie in"),
        (PIXELS.astype(np.int64), "int64 must be uint8, or float"),
        (PIXELS[..., 0], "repeat grey values"),
        (PIXELS.transpose(2, 0, 1), "channels come last"),
        (PIXELS[None], "list\\(images\\)"),
        (np.zeros((0, 4, 3), np.uint8), "must be \\(H, W, 3\\)"),
        (np.zeros((4, 4, 4), np.uint8), "drop alpha"),
        (torch.from_numpy(PIXELS), "channels come first"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "int32 must be uint8"),
        (Image.fromarray(np.zeros((4, 4), np.int32)), "mode I has no known range"),
        ({"image": 1}, "dict is no image"),
        ("nowhere.png", "nowhere.png: No such file"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_in_one_line(model: Model, image, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        model.predict(image)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": -1}, "num_steps=-1 must be between 0"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"seeds": 2}, "without denoising, no noise is drawn"),
        ({"size": (4, 4)}, "size=\\(4, 4\\) must be"),
        ({"size": 64}, "size=64 must be \\(height, width\\)"),
        ({"size": (64.0, 96.0)}, "size=\\(64.0, 96.0\\) must be"),
        ({"seeds": "3"}, "seeds='3' must be a whole number"),
        ({"num_steps": 1.5}, "num_steps=1.5 must be a whole number"),
        ({"precision": "fp8"}, "precision='fp8' must be one of fp32, bf16"),
        ({"device": "gpu"}, "device=gpu cannot be used \\(.*gpu\\); use cpu"),
        ({"device": "cuda:99"}, "device=cuda:99 cannot be used \\(.*\\); use cpu"),
    ],
)
def test_options_that_do_not_fit_are_refused(model: Model, options, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        model.predict(PIXELS, **options)
    assert "\n" not in str(caught.value)


def test_options_of_noise_are_refused_beside_a_model_that_never_saw_any(model: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "deterministic", True)
    options = {"solver": Solver.dpm, "start": 0.5, "num_averaged": 2}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"^{name} would change nothing: this model never saw noise"):
            model.segmenter(num_steps=1, inference=InferenceConfig(**{name: value}))
    model.segmenter(num_steps=1, inference=InferenceConfig(blend=0.5))
    with pytest.raises(ValueError, match="this model never saw noise; use seeds=1"):
        model.predict(PIXELS, num_steps=1, seeds=2)


def test_arrays_are_read_however_they_lie_in_memory(model: Model, recwarn: pytest.WarningsRecorder):
    expected, fixed = model.predict(PIXELS), PIXELS.copy()
    fixed.flags.writeable = False
    turned = np.ascontiguousarray(PIXELS[::-1, :, ::-1])[::-1, :, ::-1]  # as of an image whose channels are BGR
    padded = np.zeros((40, 60, 4), np.uint8)
    padded[:, :56, :3] = PIXELS
    for same in (fixed, turned, turned.astype(np.float64) / 255, padded[:, :56, :3], np.asfortranarray(PIXELS)):
        result = model.predict(same)
        assert (result.labels == expected.labels).all() and (result.image == PIXELS).all()
    assert not recwarn.list


def test_a_result_keeps_its_image_when_the_caller_uses_the_array_again(model: Model):
    frame = PIXELS.copy()
    result = model.predict(frame)
    frame[:] = 0
    assert (result.image == PIXELS).all()


def test_any_sequence_of_images_gives_a_list(model: Model):
    assert len(model.predict(deque([PIXELS, PIXELS]))) == 2  # pyright: ignore[reportArgumentType]


def test_a_model_of_stage_1_has_no_steps_and_one_without_card_no_names(tmp_path: Path):
    loaded = ICCLD.from_pretrained(save(tiny_model(), tmp_path))
    with pytest.raises(ValueError, match="denoiser is absent"):
        loaded.predict(PIXELS, num_steps=1)
    loaded.card = None
    with pytest.raises(ValueError, match="has no card"):
        loaded.predict(PIXELS)


def test_a_copy_has_no_path_of_this_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights/own").mkdir(parents=True)
    origin = {"run_dir": "runs/a", "checkpoint": "/x/stage1/checkpoints/step_00000004", "encoder": "weights/own"}
    for name in ("nvidia/mit-b5", "x" * 5000, ""):
        given = {**origin, "other": name, "step": 4, "data": {"source": ["a"]}}
        model.save_pretrained(tmp_path / "copy", origin=given)
        kept = json.loads((tmp_path / "copy/config.json").read_text())["origin"]
        assert kept == {
            "run_dir": "a", "checkpoint": "step_00000004", "encoder": "own", "other": name, "step": 4,
            "data": {"source": ["a"]},
        }  # fmt: skip
    assert "/private/runs/street" in (folder / "config.json").read_text(), "the run's own card says where it is"


def test_predicting_leaves_a_training_model_in_training(folder: Path):
    loaded = ICCLD.from_pretrained(folder)
    expected = loaded.predict(PIXELS).probabilities
    assert (loaded.train().predict(PIXELS).probabilities == expected).all() and loaded.training


def test_a_run_directory_gives_its_last_finished_stage_and_the_weights_asked_for(tmp_path: Path):
    for stage, made in (("stage1", tiny_model()), ("stage2", trained_model())):
        for weights in ("teacher", "student"):
            save(made, tmp_path / stage / "final" / weights)
    assert ICCLD.from_pretrained(tmp_path).denoiser is not None
    (tmp_path / "stage2/final/student/config.json").unlink()
    assert ICCLD.from_pretrained(tmp_path, weights="student").denoiser is None
    with pytest.raises(ValueError, match="weights='both' must be teacher, student or best"):
        ICCLD.from_pretrained(tmp_path, weights="both")
    with pytest.raises(ValueError, match="neither a model folder"):
        ICCLD.from_pretrained(tmp_path / "stage1")


@pytest.mark.parametrize("weights", ["student", "best"])
def test_one_model_has_no_other_weights(folder: Path, weights: str):
    for source, what in ((folder, "a model folder"), (str(folder), "a model folder"), ("me/model", "no folder here")):
        with pytest.raises(ValueError, match=f"^weights={weights} is of a run, and {source} is {what}"):
            ICCLD.from_pretrained(source, weights=weights)
