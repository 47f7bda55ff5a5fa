"""Stops and kills that lose nothing: scores and the picture that are due after a stage's last step, and steps that
nobody reads of.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from iccld.config import Config, load_config
from iccld.outcome import Interrupted
from iccld.programs.train import train as training
from iccld.programs.train.train import train
from iccld.runtime.checkpoint.manifest import verify
from iccld.runtime.engine.backend import Replicated
from iccld.runtime.faults.preemption import Preemption
from iccld.runtime.measure.metrics import MetricsLogger, NonFiniteError
from tests.factory import scene_overrides

SETTINGS = [
    "stages=[stage1]", "stage1.trainer.num_steps=2", "evaluation.diagnostic_images=0", "evaluation.max_images=2",
    "stage1.trainer.checkpoint.save_every=1", "stage1.trainer.evaluate_every=2", "metrics.pictures.every=2",
]  # fmt: skip


def config_of(shards: Path, run_dir: Path, *more: str) -> Config:
    return load_config([*scene_overrides(shards, run_dir), *SETTINGS, *more])


def scores(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "miou" in line]


def picture(run_dir: Path) -> Path:
    return run_dir / "pictures/stage1/step_00000002.png"


@pytest.fixture(scope="module")
def whole(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("last") / "run"
    assert train(config_of(scene_shards, run_dir))
    assert len(scores(run_dir)) == 1 and picture(run_dir).is_file()
    return run_dir


@pytest.mark.parametrize("every", [2, 0])
def test_a_stop_asked_for_in_the_last_step_leaves_them_to_the_next_attempt(
    whole: Path, scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
):
    config, preemption = config_of(scene_shards, tmp_path, f"stage1.trainer.evaluate_every={every}"), Preemption()

    def ask(*_: object, step: int) -> None:
        preemption.came = step == 2

    with monkeypatch.context() as patched:
        patched.setattr(training, "write_due_snapshot", ask)
        assert not train(config, preemption)
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["step"]) == ("preempted", 2)
    assert not scores(tmp_path) and not picture(tmp_path).exists() and not (tmp_path / "stage1/final").exists()
    assert train(config)
    assert scores(tmp_path) == (scores(whole) if every else [])
    assert picture(tmp_path).read_bytes() == picture(whole).read_bytes()


def test_a_kill_after_the_last_save_leaves_them_to_the_next_attempt(whole: Path, scene_shards: Path, tmp_path: Path):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run_dir / "stage1/final")
    picture(run_dir).unlink()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(line for line in lines if "miou" not in line))
    assert train(config_of(scene_shards, run_dir))
    assert scores(run_dir) == scores(whole)
    assert picture(run_dir).read_bytes() == picture(whole).read_bytes()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("stops", [False, True])
def test_weights_that_are_not_finite_are_not_saved(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, stops: bool
):
    """A gradient may be NaN though the loss is not: the next loss would show it, after the save."""
    settings = ["stage1.trainer.num_steps=3", "metrics.log_every=3", "stage1.trainer.evaluate_every=0"]
    settings += [f"stage1.trainer.checkpoint.save_every={9 if stops else 1}"]
    preemption, step = Preemption(), Replicated.step
    done: list[Replicated] = []

    def poison(backend: Replicated, *, with_norm: bool = False) -> None:
        step(backend, with_norm=with_norm)
        done.append(backend)
        if len(done) == 2:
            with torch.no_grad():
                next(p for p in backend.parameters().values() if p.dim() > 1).view(-1)[0] = value
            preemption.came = stops

    monkeypatch.setattr(Replicated, "step", poison)
    with pytest.raises(NonFiniteError, match=r"weights are not finite after step 2.*gradient_clip"):
        train(config_of(scene_shards, tmp_path, *settings), preemption)
    names = {path.name for path in (tmp_path / "stage1/checkpoints").glob("step*")}
    assert names == (set() if stops else {"step_00000001"})


@pytest.mark.parametrize(
    ("failure", "ends_with", "is_saved"),
    [(BrokenPipeError(), Interrupted, True), (NonFiniteError("nan"), NonFiniteError, False)],
)
def test_a_stop_saves_though_nobody_reads_the_figures_but_no_loss_that_is_not_finite(
    scene_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    ends_with: type[Exception],
    is_saved: bool,
):
    """The end of the terminal asks for the stop, and takes the output away."""
    settings = ["stage1.trainer.num_steps=3", "stage1.trainer.checkpoint.save_every=3", "metrics.log_every=3"]
    preemption = Preemption()

    def ask(*_: object, step: int) -> None:
        preemption.came = step == 1

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(training, "write_due_snapshot", ask)
    monkeypatch.setattr(MetricsLogger, "flush", fail)
    with pytest.raises(ends_with):
        train(config_of(scene_shards, tmp_path, *settings), preemption)
    folder = tmp_path / "stage1/checkpoints/step_00000001"
    assert verify(folder).step == 1 if is_saved else not folder.exists()
