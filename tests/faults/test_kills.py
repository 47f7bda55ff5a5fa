"""Killed anywhere by SIGKILL and started again by the same command, a run ends as if nothing had been."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.forked import Forked

TOOLS = Path(__file__).parents[2] / "tools" / "scripts"
DIRECTED = {"save", "rename", "latest", "retention", "export", "hand_off", "stage2"}


def module_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compare_runs() -> ModuleType:
    return module_of("compare_runs")


@pytest.fixture(scope="module")
def kill_drill(compare_runs: ModuleType) -> ModuleType:
    return module_of("kill_drill")


@pytest.mark.distributed
def test_a_killed_run_ends_as_an_undisturbed_one(
    kill_drill: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the first kill, accelerate's launcher starts the ranks; then they are forked, to start at once."""

    class ForkedDrill(kill_drill.Drill):
        launch: Forked | None = None

        def start(self, verb: list[str], environment: dict[str, str]) -> Any:
            if not self.kinds.total():
                return super().start(verb, environment)
            log = self.folder / "output"
            self.launch = Forked("tests.faults.drill_launch", verb, environment=environment, log=log)
            return self.launch

        def processes(self) -> list[psutil.Process]:
            if not self.launch:
                return super().processes()
            return [process for process in psutil.process_iter() if is_of(self.launch.pid, process.pid)]

        def ranks(self) -> list[psutil.Process]:
            if not self.launch:
                return super().ranks()
            return [process for process in self.processes() if process.pid != self.launch.pid]

    monkeypatch.setattr(kill_drill, "Drill", ForkedDrill)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["kill_drill", "--kills", "8", "--json", str(tmp_path / "kills.json")])
    assert kill_drill.main() == 0
    figures = json.loads((tmp_path / "kills.json").read_text())
    kinds = figures["kinds"]
    assert figures["kills"] == sum(kinds.values()) == 8 and figures["runs"] >= 1
    assert figures["bit_identical"] is True
    assert figures["samples_lost"] == figures["samples_repeated"] == 0
    assert all(kinds[kind] for kind in DIRECTED), kinds
    assert list(tmp_path.iterdir()) == [tmp_path / "kills.json"]


def is_of(session: int, pid: int) -> bool:
    try:
        return os.getsid(pid) == session
    except ProcessLookupError:
        return False


# What the drill itself would miss, or see:


def write_run(folder: Path) -> None:
    for stage in ("stage1", "stage2"):
        for name in ("checkpoints/step_00000002/rank_00000", "final/teacher/model"):
            path = folder / stage / f"{name}.safetensors"
            path.parent.mkdir(parents=True)
            save_file({"weight": torch.arange(3.0)}, path)
        (folder / stage / "checkpoints" / "latest").write_text("step_00000002")
    entries = [
        {"format": 2, "stage": stage, "step": 1 + i, "loss": 0.5} for stage in ("stage1", "stage2") for i in range(2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def change_a_bit(path: Path) -> None:
    weight = load_file(path)["weight"]
    weight.view(torch.int32)[1] ^= 1
    save_file({"weight": weight}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: None, ""),
        (lambda run: change_a_bit(run / "stage2/final/teacher/model.safetensors"), "other tensors in stage2/final"),
        (
            lambda run: change_a_bit(run / "stage1/checkpoints/step_00000002/rank_00000.safetensors"),
            "other tensors in stage1/checkpoints",
        ),
        (lambda run: shutil.rmtree(run / "stage1/final"), "other files in stage1/final"),
        (
            lambda run: (run / "stage1/checkpoints/latest").write_text("step_00000001"),
            "stage1: latest is step_00000001",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text(
                (run / "metrics.jsonl").read_text().replace("0.5", "0.6", 1)
            ),
            "other losses in stage1, step 1",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text(
                (run / "metrics.jsonl").read_text() + '{"format": 2, "stage": "stage2", "step": 3, "loss": 0.5}\n'
            ),
            "other losses in stage2, step 3",
        ),
    ],
)
def test_the_comparison_sees(
    tmp_path: Path,
    compare_runs: ModuleType,
    change: Callable[[Path], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    change(tmp_path / "two")
    found = list(compare_runs.differences(tmp_path / "one", tmp_path / "two", num_steps=2))
    assert len(found) == bool(message) and all(what.startswith(message) for what in found)
    monkeypatch.setattr(
        sys, "argv", ["compare_runs", *(str(tmp_path / name) for name in ("one", "two")), "--num-steps", "2"]
    )
    assert compare_runs.main() == bool(message) and capsys.readouterr().out.splitlines() == found


@pytest.mark.parametrize(
    ("event", "pattern", "work"),
    [
        ("open", r"/a\.tmp/", "open(f'{folder}/a.tmp/b', 'w')"),
        ("os.mkdir", r"/new$", "os.mkdir(f'{folder}/new')"),
        ("os.rename", r"/final$", "pathlib.Path(folder, 'a.tmp').rename(pathlib.Path(folder, 'final'))"),
        ("os.rename", r"/latest$", "pathlib.Path(folder, 'a.tmp').replace(pathlib.Path(folder, 'latest'))"),
        ("os.remove", r"/a\.tmp/", "shutil.rmtree(f'{folder}/a.tmp')"),
    ],
)
def test_a_rank_dies_just_before_the_chosen_operation(tmp_path: Path, event: str, pattern: str, work: str) -> None:
    folder, log = tmp_path / "work", tmp_path / "log"
    (folder / "a.tmp").mkdir(parents=True)
    (folder / "a.tmp" / "file").write_text("")
    before = sorted(folder.rglob("*"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(TOOLS / "kill_points"),
        "KILL_DRILL_POINT": f"kind {event} {pattern} 1 rank",
        "KILL_DRILL_LOG": str(log),
    }
    code = f"import os, pathlib, shutil\nfolder = {str(folder)!r}\n{work}"
    done = subprocess.run([sys.executable, "-c", code], env=environment | {"RANK": "0"}, timeout=60)
    assert done.returncode == -signal.SIGKILL and log.read_text() == "kind\n"
    assert sorted(folder.rglob("*")) == before
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)  # no rank
    assert done.returncode == 0 and sorted(folder.rglob("*")) != before
