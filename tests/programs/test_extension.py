"""A run that is finished trains for longer by `--extend`: nothing that rests on its earlier end stays in its place."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from iccld.cli import main
from iccld.config import read_config
from iccld.inference.source import find_model
from iccld.settings import ScheduleConfig
from iccld.trainer import learning_rate_factor
from tests.factory import scene_overrides

QUICK = ["inference.num_steps=[1]", "evaluation.diagnostic_images=0", "evaluation.max_images=2"]

METRICS = "metrics.jsonl"
BESIDE = ("pictures/stage2/step_00000001.png", "tensorboard/stage2/events.out.tfevents.1")


def steps(stage1: int, stage2: int) -> list[str]:
    return [f"stage1.trainer.num_steps={stage1}", f"stage2.trainer.num_steps={stage2}"]


@pytest.fixture(scope="module")
def finished(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extension") / "run"
    assert main(["train", *scene_overrides(scene_shards, folder), *QUICK, *steps(2, 1)]) == 0
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def train(run_dir: Path, scene_shards: Path):
    return lambda *words: main(["train", *scene_overrides(scene_shards, run_dir), *QUICK, *words])


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def trained(run_dir: Path) -> list[tuple[str, int]]:
    return [(entry["stage"], entry["step"]) for entry in lines(run_dir, "metrics.jsonl") if "loss" in entry]


def kept(run_dir: Path) -> dict[Path, bytes]:
    folders = [*run_dir.glob("stage?/final"), run_dir / "report", run_dir]
    return {path: path.read_bytes() for folder in folders for path in folder.glob("*") if path.suffix}


def checksums(run_dir: Path) -> Sequence[str]:
    return json.loads((run_dir / "report/results.json").read_text())["about"]["sha256"]


def test_the_refusal_names_the_route(run_dir: Path, train: Any, capsys: pytest.CaptureFixture[str]):
    before = kept(run_dir)
    assert train(*steps(3, 1)) == 2
    assert "(stage1.trainer.num_steps: 2 -> 3); give the same command with --extend to train for longer, or use" in (
        capsys.readouterr().err
    )
    for others in ([*steps(1, 1), "--extend"], [*steps(3, 1), "seed=1"], [*steps(3, 1), "seed=1", "--extend"]):
        assert train(*others) == 2
        said = capsys.readouterr().err
        assert "another config" in said and "give the same command" not in said
    assert kept(run_dir) == before


def test_stage_2_goes_on(run_dir: Path, train: Any, capsys: pytest.CaptureFixture[str]):
    old, scored = (run_dir / "stage2/final/teacher/model.safetensors").read_bytes(), checksums(run_dir)
    assert train(*steps(2, 3), "--extend") == 0
    said = capsys.readouterr().out
    factor = learning_rate_factor(1, num_steps=3, config=ScheduleConfig(warmup_steps=2))
    assert "stage2: 1 -> 3 steps" in said and f"at step 1 it is {factor:.3g} of the full one" in said
    assert trained(run_dir) == [("stage1", 1), ("stage1", 2), ("stage2", 1), ("stage2", 2), ("stage2", 3)]
    aside = run_dir / "before_extension/stage2_step_00000001"
    assert (aside / "stage2/final/teacher/model.safetensors").read_bytes() == old
    assert json.loads((aside / "report/results.json").read_text())["about"]["sha256"] == scored
    assert checksums(run_dir)[0] == scored[0] and checksums(run_dir)[1] != scored[1], "what is new is scored"
    assert json.loads((run_dir / "stage2/final/hand_off.json").read_text())["step"] == 3
    assert [e["event"] for e in lines(run_dir, "events.jsonl")].count("extended") == 1


def test_stage_2_does_not_stay_on_an_earlier_stage_1(run_dir: Path, train: Any, capsys: pytest.CaptureFixture[str]):
    old, metrics = [(run_dir / path).read_bytes() for path in ("stage2/final/teacher/model.safetensors", METRICS)]
    for path in BESIDE:
        (run_dir / path).parent.mkdir(parents=True)
        (run_dir / path).write_text("old")
    assert train(*steps(3, 1), "--extend") == 0
    assert "stage2 rested on stage1 after 2 steps: it is set aside, and trained again" in capsys.readouterr().out
    assert trained(run_dir) == [("stage1", 1), ("stage1", 2), ("stage1", 3), ("stage2", 1)]
    assert (run_dir / "stage2/final/teacher/model.safetensors").read_bytes() != old
    aside = run_dir / "before_extension/stage1_step_00000002"
    assert {str(path.relative_to(aside)) for path in aside.glob("*/*")} == {
        *("stage1/final", "stage2/checkpoints", "stage2/final", "report/results.json"),
        *("pictures/stage2", "tensorboard/stage2"),
    }
    assert (aside / METRICS).read_bytes() == metrics and b"final/" in metrics
    assert not any((run_dir / path).exists() for path in BESIDE)
    assert find_model(aside) == aside / "stage2/final/teacher", "the model that was is one still"
    before = (run_dir / "events.jsonl").read_bytes()
    for again in ((*steps(3, 1), "--extend"), steps(3, 1)):
        assert train(*again) == 0
    assert (run_dir / "events.jsonl").read_bytes() == before, "a finished command changes no goodput"


def test_one_that_was_killed_between_the_moves_goes_on(run_dir: Path, train: Any):
    aside = run_dir / "before_extension/stage1_step_00000002"
    (aside / "report").mkdir(parents=True)
    (run_dir / "stage2").rename(aside / "stage2")
    (aside / METRICS).write_text("of the first try")
    (run_dir / "report/results.json").rename(aside / "report/results.json")
    assert train(*steps(3, 2), "--extend") == 0
    assert trained(run_dir) == [*(("stage1", step) for step in (1, 2, 3)), ("stage2", 1), ("stage2", 2)]
    assert read_config(run_dir / "config.yaml").stage1.trainer.num_steps == 3
    assert (aside / METRICS).read_text() == "of the first try"


def test_a_run_without_its_checkpoints_is_not_extended(run_dir: Path, train: Any, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(run_dir / "stage2/checkpoints")
    assert train(*steps(2, 3), "--extend") == 2
    assert "stage2/checkpoints holds no checkpoint to go on from" in capsys.readouterr().err
    assert (run_dir / "stage2/final").is_dir() and (run_dir / "report/results.json").is_file()


def test_only_a_stage_that_is_trained_is_extended(run_dir: Path, train: Any, capsys: pytest.CaptureFixture[str]):
    before = kept(run_dir)
    assert train(*steps(3, 1), "stages=[stage2]", "--extend") == 2
    assert "stage1.trainer.num_steps=3 asks for more steps than 2 of a stage that stages=[stage2] does not train" in (
        capsys.readouterr().err
    )
    assert kept(run_dir) == before and not (run_dir / "before_extension").exists()
    assert train(*steps(3, 1), "stages=[stage1]", "--extend") == 0
    said = capsys.readouterr().out
    assert "it is set aside\n" in said and "trained again" not in said
