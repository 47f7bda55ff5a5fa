"""The GPU programme: each part apart, within its limit, and its figures kept as soon as it ends."""

import json
import os
import subprocess
from pathlib import Path

import gpu
import pytest

from tests.factory import scene_overrides

ROOT = Path(__file__).parents[2]
MEASURED = {"samples_per_s": 30.0, "mfu": 0.5, "peak_gib": 40.0}


def run(folder: Path, *, only: str = "", timeout_s: float) -> subprocess.CompletedProcess[str]:
    command = ["bash", "tools/gpu.sh", str(folder)]
    environment = os.environ | {"ONLY": only}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


def test_chosen_parts_are_added_to_those_of_an_earlier_call(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"stage1": {"eager": MEASURED}}))
    done = run(tmp_path, only="limits attention", timeout_s=200)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["limits"]["versions"]["torch"] and "CUDA" in json.dumps(figures["attention"])
    assert figures["stage1"]["eager"]["mfu"] == 0.5 and "eager.mfu" in done.stdout, "the table has all"
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_a_part_that_takes_too_long_is_said_so(tmp_path: Path) -> None:
    figures = gpu.run_apart("correctness", tmp_path, 1)
    assert "not over within" in figures["failed"] and not list(tmp_path.iterdir())


def test_a_grid_that_is_given_is_evidence(scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = [word for word in scene_overrides(scene_shards, tmp_path) if not word.startswith("run_dir=")]
    common += ["stage1.trainer.num_steps=2", "evaluation.max_images=2"]
    grid = {"baseline": "stage1", "seeds": [0], "common": common, "runs": {"stage1": {"settings": ["stages=[stage1]"]}}}
    (tmp_path / "given").mkdir()
    (tmp_path / "given/grid.yaml").write_text(json.dumps(grid))
    monkeypatch.setenv("EVIDENCE", str(tmp_path / "given"))
    (tmp_path / "out").mkdir()
    figures = gpu.run_apart("evidence", tmp_path / "out", 600)
    assert not gpu.has_failed(figures) and figures["runs"]["stage1"]["seeds"] == [0], figures
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evidence_summary.json", "evidence_report.md", "evidence.log"
    }  # fmt: skip


@pytest.mark.slow
def test_all_of_it_runs_at_toy_size(tmp_path: Path) -> None:
    done = run(tmp_path, timeout_s=1800)
    figures = json.loads((tmp_path / "gpu.json").read_text())
    failed = {name: figures[name] for name in gpu.PARTS if gpu.has_failed(figures[name])}
    assert done.returncode == 0 and not failed, (failed, done.stderr[-2000:])
    assert len(list(tmp_path.iterdir())) <= 8
    correctness = figures["correctness"]
    assert all(correctness[name]["same_bits"] for name in correctness if "_as_" in name)
    assert all(correctness[name]["within"] for name in correctness if name.endswith("_losses"))
    assert {"samples_per_s", "peak_gib", "flops"} <= figures["stage1"]["eager"].keys() & figures["stage2"][
        "eager"
    ].keys()


def test_what_failed_anywhere_in_a_part_counts() -> None:
    assert gpu.has_failed({"failed": "why"}) and gpu.has_failed({"eager": {"failed": "why"}})
    assert gpu.has_failed({"zero1_losses": {"within": False}})
    assert not gpu.has_failed({"failed": {}, "eager": {"mfu": 0.5}, "zero1_losses": {"within": True}})
