"""Snapshots on disk, model folders made of them, the sweep's table, and one line for each way to be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from iccld.config import Config, load_config, to_yaml
from iccld.models.iccld import ICCLD
from iccld.models.model_card import ModelStage
from iccld.programs.evaluate.averaging import put_weights, read_snapshots, reconstruction_of, write_snapshot
from iccld.stages.table import STAGES, stage_of
from iccld.uda.ema_profile import PowerAverages
from tests.factory import scene_overrides
from tools.scripts import reconstruct_ema

ROOT = Path(__file__).parents[2]
NUM_STEPS, EVERY, WIDTHS = 64, 8, [0.05, 0.10]
UNTRACKED = 0.07


def _walk(model: ICCLD, step: int) -> dict[str, Tensor]:
    """The student after `step`: each parameter on its own way round the teacher's, a half-turn in the whole run."""
    turn = torch.tensor(3.14 * step / NUM_STEPS)
    return {
        name: p.detach() * (1 + 0.3 * torch.sin(turn + i)) + 0.05 * torch.cos(turn * (1 + i % 3))
        for i, (name, p) in enumerate(stage_of(model).averaged(model).named_parameters())
    }


def _train(model: ICCLD, folder: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Snapshots of a walk; the averages at its end, of one untracked width too."""
    averages = PowerAverages(_walk(model, 0), WIDTHS)
    direct = PowerAverages(_walk(model, 0), [UNTRACKED])
    for step in range(NUM_STEPS):
        student = _walk(model, step)
        averages.update(student, step)
        direct.update(student, step)
        if (step + 1) % EVERY == 0:
            write_snapshot(folder, averages.state_dict(), step=step + 1, widths=WIDTHS, dtype=dtype)
    return averages.state_dict() | direct.state_dict()


@pytest.fixture(scope="module")
def config(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The settings of a finished run, in its directory; its teachers are not trained."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    config = load_config([*scene_overrides(scene_shards, run_dir), "inference.num_steps=[1,2]"])
    classes = config.data.class_set.build()
    for stage in STAGES:
        torch.manual_seed(0)
        model = ICCLD(config=config.model, num_classes=classes.num_classes, with_denoiser=stage == "stage2")
        model.stage = ModelStage.adversarial if stage == "stage2" else ModelStage.segmentation
        model.latent_mean.uniform_(-1, 1)
        folder = run_dir / stage / "final" / "teacher"
        model.save_pretrained(
            folder, class_names=classes.names, palette=classes.palette, origin={"run_dir": str(run_dir)}
        )
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return config


@pytest.fixture(scope="module")
def expected(config: Config) -> dict[str, dict[str, Tensor]]:
    """The averages at the end of each stage, whose snapshots are in the run directory."""
    run_dir = Path(config.run_dir)
    return {
        stage: _train(ICCLD.from_pretrained(run_dir / stage / "final/teacher"), run_dir / stage / "ema")
        for stage in STAGES
    }


def reconstruct(config: Config, *arguments: str | Path) -> None:
    reconstruct_ema.main([config.run_dir, *map(str, arguments)])


def of_width(averages: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in averages.items() if name.startswith(f"{prefix}/")}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_tracked_width_comes_back_exactly_in_a_folder_like_the_teachers(
    config: Config, expected: dict[str, dict[str, Tensor]], tmp_path: Path, stage: str
):
    reconstruct(config, "--stage", stage, "--width", "0.05", "--output", tmp_path / "model")
    teacher = ICCLD.from_pretrained(Path(config.run_dir) / stage / "final/teacher")
    model = ICCLD.from_pretrained(tmp_path / "model")
    parameters = dict(stage_of(model).averaged(model).named_parameters())
    averages = of_width(expected[stage], "ema_0.050")
    assert parameters.keys() == averages.keys()
    for name, average in averages.items():
        assert torch.equal(parameters[name], average), name
    moved = {id(p) for p in parameters.values()}
    of_teacher = teacher.state_dict()
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) in moved or torch.equal(tensor, of_teacher[name]), name
    assert model.card is not None and teacher.card is not None and model.stage is teacher.stage
    assert model.card.class_names == teacher.card.class_names and model.card.palette == teacher.card.palette
    assert model.card.origin["width"] == 0.05 and model.card.origin["step"] == NUM_STEPS
    assert model.card.origin["run_dir"] == config.run_dir
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_an_earlier_step_is_that_steps_average_whatever_came_after(
    config: Config, expected: dict[str, dict[str, Tensor]], tmp_path: Path
):
    reconstruct(config, "--stage", "stage2", "--width", "0.1", "--step", "24", "--output", tmp_path / "model")
    kept = of_width(load_file(Path(config.run_dir) / "stage2/ema/step_00000024.safetensors"), "ema_0.100")
    rebuilt = ICCLD.from_pretrained(tmp_path / "model").denoiser
    assert rebuilt is not None
    assert all(torch.equal(p, kept[name]) for name, p in rebuilt.named_parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0015), (torch.float16, 0.004)])
def test_an_untracked_width_is_near_an_average_of_that_width(
    config: Config, tmp_path: Path, dtype: torch.dtype, tolerance: float
):
    """8 snapshots meet the profile of 0.07 to 1.3 %; the walk is smooth, so its average errs by a tenth of it.

    The tolerance is relative to how far a tensor's entries go; fp16 adds roundings of 0.05 % of the value.
    """
    teacher = ICCLD.from_pretrained(Path(config.run_dir) / "stage2/final/teacher")
    direct = of_width(_train(teacher, tmp_path, dtype=dtype), "ema_0.070")
    students = [_walk(teacher, step) for step in range(NUM_STEPS)]
    plan = reconstruction_of(read_snapshots(tmp_path), width=UNTRACKED)
    assert 0.005 < plan.profile_error < 0.02
    put_weights(stage_of(teacher).averaged(teacher), plan)
    for name, parameter in stage_of(teacher).averaged(teacher).named_parameters():
        way = torch.stack([student[name] for student in students])
        error = (parameter.detach() - direct[name]).abs().max() / (way.amax(dim=0) - way.amin(dim=0)).max()
        assert error < tolerance, name


def test_the_sweep_scores_the_teacher_and_each_width(
    config: Config, expected: dict[str, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "sweep.json"
    reconstruct(config, "inference.num_steps=[1]", "--stage", "stage2", "--sweep", "0.05,0.07", "--json", file)
    printed = capsys.readouterr().out
    assert "teacher x1" in printed and "ema_0.050 x1" in printed and "ema_0.070 after 64 steps" in printed
    figures = json.loads(file.read_text())
    teacher, tracked, untracked = figures["rows"]
    assert [row["width"] for row in figures["rows"]] == [None, 0.05, 0.07]
    assert tracked["profile_error"] < 1e-7 < untracked["profile_error"] < 0.02
    assert all(set(row["scores"]) == {"1"} and row["scores"]["1"]["num_images"] == 5 for row in figures["rows"])
    assert teacher["scores"] != tracked["scores"]
    # The rows do not depend on those before: a width alone scores the same.
    reconstruct(config, "inference.num_steps=[1]", "--stage", "stage2", "--sweep", "0.07", "--json", file)
    assert json.loads(file.read_text())["rows"] == [teacher, untracked]


def test_stage_1_is_scored_without_denoising(config: Config, expected: dict[str, dict[str, Tensor]], tmp_path: Path):
    file = tmp_path / "sweep.json"
    reconstruct(config, "--stage", "stage1", "--sweep", "0.15", "--json", file)
    assert [set(row["scores"]) for row in json.loads(file.read_text())["rows"]] == [{"0"}, {"0"}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "0.5", "--output", "new"], "width=0.5 must be between 0 and 0.2886"),
        (["--width", "0.05", "--output", "new", "--step", "20"], "--step 20: no snapshot was taken there (the nearest"),
        (["--width", "0.05", "--output", "."], "--output . is there already, and is not an empty folder; name a new"),
        (["--sweep", "0.05,x"], "--sweep 0.05,x must be numbers with commas"),
        (["--sweep", "0.05", "inference.nothing=1"], "not the settings of a run"),
    ],
)
def test_what_is_wrong_is_one_line(
    config: Config, expected: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, arguments: list[str], words: str,
):  # fmt: skip
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        reconstruct(config, "--stage", "stage2", *arguments)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_run_without_snapshots_is_named_by_the_script(config: Config, tmp_path: Path):
    (tmp_path / "run/stage2").mkdir(parents=True)
    (tmp_path / "run/stage2/final").symlink_to(Path(config.run_dir) / "stage2/final")
    arguments = ["run", "--stage", "stage2", "--width", "0.05", "--output", "new"]
    command = [sys.executable, str(ROOT / "tools/scripts/reconstruct_ema.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    words = "train with stage2.objective.ema_profile.widths="
    assert done.stderr.startswith(f"reconstruct_ema: run/stage2/ema holds no snapshots; {words}")


def test_an_unfinished_stage_is_named(tmp_path: Path):
    for what in (["--width", "0.05", "--output", str(tmp_path / "new")], ["--sweep", "0.05"]):
        (tmp_path / "config.yaml").write_text(f"run_dir: {tmp_path}\n")
        with pytest.raises(
            ValueError, match=r"holds no finished stage2 \(.*stage2/final/teacher\); let the same train"
        ):
            reconstruct_ema.main([str(tmp_path), "--stage", "stage2", *what])


def test_width_and_output_belong_together(config: Config, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        reconstruct(config, "--stage", "stage2", "--width", "0.05")
    assert "--width and --output belong together" in capsys.readouterr().err


def test_snapshots_of_another_model_are_refused_before_a_weight_changes(config: Config, tmp_path: Path):
    write_snapshot(tmp_path, {"ema_0.050/w": torch.ones(100)}, step=8, widths=[0.05])
    model = ICCLD.from_pretrained(Path(config.run_dir) / "stage2/final/teacher")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"step_00000008.safetensors is of another model than the run's: \d+ averages"):
        put_weights(stage_of(model).averaged(model), reconstruction_of(read_snapshots(tmp_path), width=0.05))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
