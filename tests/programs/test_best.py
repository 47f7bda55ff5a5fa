"""The teacher that scored best in training is kept: one folder, exact over a resume, whole at every moment."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from iccld.cli import main
from iccld.config import Config, config_from, load_config
from iccld.inference import source
from iccld.inference.source import find_model, load_model
from iccld.models.best_model import best_of, score_of
from iccld.models.iccld import ICCLD
from iccld.programs.run import best
from iccld.programs.run.best import keep_best
from tests.factory import scene_overrides, tiny_model_config

NUM_STEPS = 3
SETTINGS = [
    f"stage1.trainer.num_steps={NUM_STEPS}", "stage1.trainer.evaluate_every=1", "stages=[stage1]",
    "stage1.trainer.checkpoint.save_every=1", "stage1.trainer.checkpoint.keep=5", "evaluation.diagnostic_images=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> ICCLD:
    torch.manual_seed(0)
    return ICCLD(config=tiny_model_config(), num_classes=19, with_denoiser=False)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_from({}, where="test", overrides=[f"run_dir={tmp_path}/run"])


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "stage1/best").iterdir())


def keep(model: ICCLD, config: Config, *, step: int, miou: float, settings: str = "a") -> list[str]:
    keep_best(model, config, stage="stage1", step=step, score={"miou": miou, "num_steps": 0, "settings": settings})
    return names(Path(config.run_dir))


def test_one_folder_of_the_highest_score_the_first_of_equal_ones(model: ICCLD, config: Config):
    kept = [keep(model, config, step=step, miou=miou) for step, miou in enumerate([1.0, 3.0, 2.0, 3.0, 4.0, 0.0], 1)]
    steps = [1, 2, 2, 2, 5, 5]
    assert kept == [[f"step_{step:08d}"] for step in steps]
    folder = best_of(Path(config.run_dir) / "stage1")
    assert folder and score_of(folder) == 4.0
    readme = (folder / "README.md").read_text()
    assert "flatters it: mIoU 4.00" in readme


def test_a_score_by_other_settings_makes_way(model: ICCLD, config: Config):
    settings = ["a", "a", "b", "b", "b"]
    kept = [
        keep(model, config, step=step, miou=miou, settings=settings[step - 1])
        for step, miou in enumerate([9.0, 1.0, 2.0, 3.0, 1.0], 1)
    ]
    assert kept == [[f"step_{step:08d}"] for step in (1, 1, 3, 4, 4)]


def test_what_a_kill_leaves_is_both_and_then_one(
    model: ICCLD, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    keep(model, config, step=1, miou=1.0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(best, "clear_away", killed)
        keep(model, config, step=2, miou=2.0)
    assert names(tmp_path / "run") == ["step_00000001", "step_00000002"]
    found = best_of(tmp_path / "run/stage1")
    assert found and found.name == "step_00000002"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(best, "sync", killed)
        keep(model, config, step=3, miou=3.0)
    assert "step_00000003.tmp" in names(tmp_path / "run") and best_of(tmp_path / "run/stage1") == found
    assert keep(model, config, step=4, miou=1.0) == ["step_00000002"], "also without a new best one"


def test_a_damaged_one_makes_way_and_what_is_not_ours_stays(model: ICCLD, config: Config, tmp_path: Path):
    keep(model, config, step=1, miou=5.0)
    (tmp_path / "run/stage1/best/step_00000001/config.json").write_text("{")
    mine = tmp_path / "run/stage1/best/step_00000009"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert keep(model, config, step=1, miou=1.0) == ["step_00000001", "step_00000009"]
    assert ICCLD.from_pretrained(tmp_path / "run/stage1/best/step_00000001").card


def test_one_that_cannot_be_removed_ends_no_training(
    model: ICCLD, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(folder: Path) -> None:
        raise OSError(39, "Directory not empty", str(folder))

    keep(model, config, step=1, miou=1.0)
    with monkeypatch.context() as patched:
        patched.setattr("iccld.durable.remove_tree", fail)
        assert keep(model, config, step=2, miou=2.0) == ["step_00000001", "step_00000002"]
    found = best_of(tmp_path / "run/stage1")
    assert found and found.name == "step_00000002" and keep(model, config, step=3, miou=1.0) == ["step_00000002"]


def test_one_that_is_replaced_before_it_is_read_is_looked_for_again(
    model: ICCLD, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(folder: Path) -> str:
        keep(model, config, step=2, miou=2.0)
        assert ICCLD.from_pretrained(folder).card
        return folder.name

    keep(model, config, step=1, miou=1.0)
    assert load_model(tmp_path / "run", load, weights="best") == "step_00000002"
    looks = iter([None, tmp_path / "run/stage1/best/step_00000002"])
    with monkeypatch.context() as patched:
        patched.setattr(source, "best_of", lambda _: next(looks))
        assert find_model(tmp_path / "run", weights="best").name == "step_00000002"
    (tmp_path / "run/stage1/best/step_00000002/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_model(tmp_path / "run", ICCLD.from_pretrained, weights="best")


@pytest.mark.parametrize("is_link", [False, True])
def test_in_the_place_of_what_is_not_ours_none_is_kept(
    model: ICCLD, config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str], is_link: bool
):
    keep(model, config, step=1, miou=1.0)
    mine, place = tmp_path / "mine", tmp_path / "run/stage1/best/step_00000002"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    _ = place.symlink_to(mine) if is_link else shutil.copytree(mine, place)
    assert keep(model, config, step=2, miou=2.0) == ["step_00000001", "step_00000002"]
    assert (place / "notes.txt").read_text() == "mine" and (mine / "notes.txt").read_text() == "mine"
    (said,) = capfd.readouterr().err.splitlines()
    assert "step_00000002 is not a model of this run, so the best teacher is not kept; move it away." in said


@pytest.fixture(scope="module")
def trained(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best") / "run"
    assert main(["train", *scene_overrides(scene_shards, folder), *SETTINGS]) == 0
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """The files of the best model, without the run's path."""
    found = best_of(folder / "stage1")
    assert found
    card = json.loads((found / "config.json").read_text())
    return {**card, "origin": {**card["origin"], "run_dir": ""}, "folder": found.name}


def mious(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["miou"] for line in lines if "miou" in line]


def test_it_is_the_teacher_of_the_best_step(trained: Path, tmp_path: Path):
    scores = mious(trained)
    step = scores.index(max(scores)) + 1
    assert len(scores) == NUM_STEPS and names(trained) == [f"step_{step:08d}"]
    checkpoint = trained / f"stage1/checkpoints/step_{step:08d}"
    assert main(["checkpoint", "export", str(checkpoint), str(tmp_path / "model")]) == 0
    exported = json.loads((tmp_path / "model/config.json").read_text())
    assert contents(trained)["weights_sha256"] == exported["weights_sha256"]
    assert contents(trained)["origin"]["score"]["miou"] == max(scores)


@pytest.mark.parametrize("first", [1, 2])
def test_a_resume_ends_with_the_same_one(trained: Path, scene_shards: Path, tmp_path: Path, first: int):
    """Killed after the last score, with an older checkpoint as the newest: what it kept came from later steps."""
    run_dir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run_dir / "stage1/final")
    for step in range(first + 1, NUM_STEPS + 1):
        shutil.rmtree(run_dir / f"stage1/checkpoints/step_{step:08d}")
    assert main(["train", *scene_overrides(scene_shards, run_dir), *SETTINGS]) == 0
    assert contents(run_dir) == contents(trained) and mious(run_dir) == mious(trained)


def test_a_score_from_before_the_kill_counts(trained: Path, scene_shards: Path, tmp_path: Path):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run_dir / "stage1/final")
    for step in (2, 3):
        shutil.rmtree(run_dir / f"stage1/checkpoints/step_{step:08d}")
    found = best_of(run_dir / "stage1")
    assert found
    card = json.loads((found / "config.json").read_text())
    card["origin"]["score"]["miou"] = 99.0
    (found / "config.json").write_text(json.dumps(card))
    (found.rename(found.with_name("step_00000001")) / "README.md").write_text("as it was")
    assert main(["train", *scene_overrides(scene_shards, run_dir), *SETTINGS]) == 0
    assert names(run_dir) == ["step_00000001"]
    assert (run_dir / "stage1/best/step_00000001/README.md").read_text() == "as it was"


def test_after_a_change_of_the_validation_a_score_from_before_does_not_count(
    trained: Path, scene_shards: Path, tmp_path: Path
):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run_dir / "stage1/final")
    shutil.rmtree(run_dir / "stage1/checkpoints/step_00000003")
    found = best_of(run_dir / "stage1")
    assert found
    card = json.loads((found / "config.json").read_text())
    card["origin"]["score"]["miou"] = 99.0
    (found / "config.json").write_text(json.dumps(card))
    assert main(["train", *scene_overrides(scene_shards, run_dir), *SETTINGS, "evaluation.max_images=1"]) == 0
    found = best_of(run_dir / "stage1")
    assert found and score_of(found) == mious(run_dir)[-1], "that of the only step since"


def test_it_is_found_by_its_name(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    assert find_model(run_dir) == run_dir / "stage1/final/teacher", "the last one is the default"
    assert find_model(run_dir, weights="best") == best_of(run_dir / "stage1")
    assert main(["evaluate", str(run_dir), "inference.weights=best"]) == 0
    results = json.loads((run_dir / "report/results_best.json").read_text())
    assert results["stage1"]["miou"] == max(mious(run_dir)), "the same images as in training"
    shutil.copytree(run_dir / "stage1/final", run_dir / "stage1_old/final")
    assert find_model(run_dir) == run_dir / "stage1/final/teacher", "a copy is no stage"
    shutil.copytree(run_dir / "stage1/final", run_dir / "stage2/final")
    assert find_model(run_dir) == run_dir / "stage2/final/teacher"
    with pytest.raises(ValueError, match=r"holds no best teacher of stage2.*stage2\.trainer\.evaluate_every"):
        find_model(run_dir, weights="best")


def test_without_scores_in_training_there_is_none(scene_shards: Path, tmp_path: Path):
    words = [*scene_overrides(scene_shards, tmp_path), "inference.weights=best", "stages=[stage1]"]
    load_config(words)
    assert main(["train", *words]) == 2
    assert not (tmp_path / "stage1").exists()
