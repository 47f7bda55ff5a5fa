"""A grid of two rows and two seeds on the embedded scenes: killed in the middle, it goes on, and reports."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from iccld.cli import main
from iccld.plain_yaml import to_yaml
from tests.factory import scene_overrides
from tests.forked import Forked

LIMIT_S = 240
SECOND_STAGES = ["stage2 x1", "stage1", "stage2 x2", "mean latent"]


def write_grid(path: Path, shards: Path, *, first: list[str], **more: Any) -> Path:
    common = [word for word in scene_overrides(shards, Path("unused")) if not word.startswith("run_dir=")]
    common += ["inference.num_steps=[1,2]", "stage2.trainer.num_steps=2"]
    runs = {
        "first": {"settings": ["stage=segmentation", *first]},
        "second": {"after": "first", "settings": ["stage=adversarial"], "about": "a denoiser above it"},
    }
    path.write_text(to_yaml({"baseline": "first", "seeds": [0, 1], "common": common, "runs": runs | more}))
    return path


def begin(grid: Path, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "iccld", "ablate", str(grid), "--output", str(folder), "--processes", "2"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ)


def kill_all(process: "subprocess.Popen[str]") -> None:
    """Kill the command and its trainings, as a machine's end does; none of them can save."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        child.kill()
    psutil.wait_procs(children, timeout=30)
    process.communicate()


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def is_finished(run_dir: Path) -> bool:
    return (run_dir / "report/results.json").is_file()


@pytest.mark.slow
def test_a_grid_that_is_killed_goes_on_and_trains_nothing_twice(scene_shards: Path, tmp_path: Path):
    grid = write_grid(tmp_path / "grid.yaml", scene_shards, first=["stage1.trainer.num_steps=4"])
    folder = tmp_path / "out"
    runs = {name: [folder / name / f"seed_{seed}" for seed in (0, 1)] for name in ("first", "second")}
    every = [run for of_row in runs.values() for run in of_row]
    process, limit = begin(grid, folder), time.monotonic() + LIMIT_S
    while not (any(map(is_finished, runs["first"])) and any((run / "config.yaml").exists() for run in runs["second"])):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    kill_all(process)
    before = {run: (run / "events.jsonl").read_bytes() for run in every if is_finished(run)}
    assert before and not all(map(is_finished, runs["second"]))

    process = begin(grid, folder)
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    assert "[4/4]" in said and all(f"{run.parent.name}/{run.name}: begins" not in said for run in before)
    for run, content in before.items():
        assert (run / "events.jsonl").read_bytes() == content, "a finished row is never run again"
    for name, stage in (("first", "stage1"), ("second", "stage2")):
        for run in runs[name]:
            assert {event["stage"] for event in events(run, "started")} == {stage}
            assert len(events(run, "finished")) == 1
    for first, second in zip(*runs.values(), strict=True):  # stage 1 was trained once, and is a copy of its own
        paths = [run / "stage1/final/hand_off.json" for run in (first, second)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        weights = [path.with_name("teacher") / "model.safetensors" for path in paths]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert weights[0].stat().st_ino != weights[1].stat().st_ino
    check_report(folder)

    assert main(["ablate", str(grid), "--output", str(folder)]) == 0  # nothing is left to train
    assert all(len(events(run, "finished")) == 1 for run in every)


def check_report(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["first", "second"]
    for name, row in summary.items():
        results = [json.loads((folder / name / f"seed_{s}/report/results.json").read_text()) for s in (0, 1)]
        scores = [each["stage1"] if name == "first" else each["stage2"]["1"] for each in results]
        mious = [score["miou"] for score in scores]
        assert row["seeds"] == [0, 1] and row["missing_seeds"] == []
        assert row["miou_mean"] == pytest.approx(sum(mious) / 2)
        assert row["miou_std"] == pytest.approx(abs(mious[0] - mious[1]) / 2**0.5)
        assert row["miou_se"] == pytest.approx(abs(mious[0] - mious[1]) / 2)
        assert [row["by_seed"][seed]["miou"] for seed in "01"] == mious
        assert row["boundary_miou_mean"] == pytest.approx(sum(score["boundary_miou"] for score in scores) / 2)
        assert 0 < row["minutes"] < 5 and 0 < row["peak_gib"] < 50 and row["commit"] and "road" in row["classes"]
    first, second = summary.values()
    assert first["paired_difference"] == 0 and first["judgement"] == "baseline" and first["scored"] == "stage1"
    gains = [second["by_seed"][seed]["miou"] - first["by_seed"][seed]["miou"] for seed in "01"]
    assert second["paired_difference"] == pytest.approx(sum(gains) / 2)
    assert second["paired_se"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    assert list(second["scores"]) == SECOND_STAGES and second["scored"] == "stage2 x1"
    assert second["gain_over_own_stage1"]["paired_difference"] == pytest.approx(second["paired_difference"])
    report = (folder / "report.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("| `second` |")]
    assert len(rows) == 1 + len(SECOND_STAGES) and all("±" in row for row in rows)
    assert f"stage1_from={folder}/first/seed_1" in report and first["commit"].split(" with")[0] in report
    for name in ("classes_1.png", "pictures_1.png"):
        assert name in report and (folder / name).read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_saves_the_row_and_a_changed_grid_is_refused(
    scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = ["stage1.trainer.num_steps=400", "metrics.log_every=1"]
    grid = write_grid(tmp_path / "grid.yaml", scene_shards, first=settings)
    folder, seed_0 = tmp_path / "out", tmp_path / "out/first/seed_0"
    log, words = tmp_path / "log", [str(grid), "--output", str(folder), "--processes", "1"]
    process = Forked("iccld", ["ablate", *words], environment=dict(os.environ), log=log)
    limit = time.monotonic() + LIMIT_S
    while not ((seed_0 / "metrics.jsonl").is_file() and (seed_0 / "metrics.jsonl").read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    assert main(["ablate", str(grid), "--output", str(folder)]) == 2
    assert f"{folder} is in use by process {process.pid}" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    status, said = process.wait(LIMIT_S), log.read_text()
    assert status == 128 + signal.SIGINT and "the same command goes on" in said, said
    assert events(seed_0, "preempted") and (seed_0 / "stage1/checkpoints/latest").exists()
    assert main(["ablate", str(grid), "--output", str(folder), "--report-only"]) == 0
    assert "`first` (seed 0, 1), `second` (seed 0, 1)" in (folder / "report.md").read_text()
    assert main(["ablate", str(grid), "--output", str(folder), "--dry-run"]) == 0
    assert "second/seed_1: waiting, after first/seed_1" in capsys.readouterr().out
    write_grid(grid, scene_shards, first=settings, second={"initial": "first", "settings": ["stage=segmentation"]})
    assert main(["ablate", str(grid), "--output", str(folder), "--dry-run"]) == 0  # it has not begun
