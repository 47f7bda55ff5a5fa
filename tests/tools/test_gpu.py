"""The GPU programme: each part apart, within its limit, and its figures kept as soon as it ends."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import gpu
import psutil
import pytest
from gpu_parts import evidence, family
from gpu_parts.family import run_within

from tests.factory import scene_overrides

ROOT = Path(__file__).parents[2]
MEASURED = {"samples_per_s": 30.0, "mfu": 0.5, "peak_gib": 40.0}


def run(folder: Path, *, timeout_s: float, **variables: str) -> subprocess.CompletedProcess[str]:
    command, environment = ["bash", "tools/gpu.sh", str(folder)], os.environ | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


def still_runs(log: Path) -> bool:
    """Tell whether the process whose number is in the log runs; one that was killed may wait for init to read it."""
    try:
        return psutil.Process(int(log.read_text())).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_chosen_parts_are_added_to_those_of_an_earlier_call(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"stage1": {"eager": MEASURED}}))
    done = run(tmp_path, timeout_s=200, ONLY="limits")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["limits"]["versions"]["torch"]
    assert figures["stage1"]["eager"]["mfu"] == 0.5 and "eager.mfu" in done.stdout, "the table has all"
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_a_part_that_takes_too_long_is_said_so(tmp_path: Path) -> None:
    figures = gpu.run_apart("correctness", tmp_path, 1)
    assert "not over within" in figures["failed"] and not list(tmp_path.iterdir())


def test_the_group_of_tests_names_its_files_and_installs_nothing(tmp_path: Path) -> None:
    for path, text in {
        "tools/setup.sh": "echo installs; exit 1",
        "tests/test_one.py": "@pytest.mark.gpu",
        "tests/test_other.py": "import moto",
        "bin/python3": "#!/bin/sh\necho python3 $*",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "bin/python3").chmod(0o755)
    shutil.copy(ROOT / "tools/test.sh", tmp_path / "tools")
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command = ["bash", "tools/test.sh", "gpu", "-v"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "python3 -m pytest -m gpu tests/test_one.py -v\n"), done.stderr


SLEEPER = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
IN_ITS_PART = """
import os, signal, sys
from pathlib import Path
import gpu
folder = Path(sys.argv[2])
def begin(name, *_):
    return {"status": gpu.run_within(600, [sys.executable, "-c", sys.argv[1]], log=folder / "log", cwd=folder)}
gpu.run_apart = begin
gpu.torch.cuda.is_available = lambda: False  # one part at a time
os.environ[gpu.MARK] = gpu.new_mark()
signal.signal(signal.SIGTERM, gpu.end_with_all)
gpu.run_all(["tests", "correctness"], folder, limit_s=600, total_s=600)
"""


@pytest.mark.parametrize("until", ["it ends", "its limit"])
def test_a_process_with_a_session_of_its_own_does_not_outlive_its_part(until: str, tmp_path: Path) -> None:
    waits = "; import time; time.sleep(600)" if until == "its limit" else ""
    status = run_within(8, [sys.executable, "-c", SLEEPER + waits], log=tmp_path / "log", cwd=tmp_path)
    assert status == (None if waits else 0)
    assert not still_runs(tmp_path / "log")


def test_a_programme_that_is_stopped_leaves_no_part_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", IN_ITS_PART, f"{SLEEPER}; import time; time.sleep(600)", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    with subprocess.Popen(command, env=environment) as process:
        end = time.monotonic() + 120
        while not (log.exists() and log.read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 128 + 15
    assert not still_runs(log)
    assert not (tmp_path / "gpu.json").exists(), "a part that was killed has not failed"


def test_no_part_begins_while_the_programme_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, stopped = [], Event()

    def stops(name: str, *_: object) -> Mapping[str, Any]:
        begun.append(name)
        stopped.set()
        return {"failed": "killed"}

    monkeypatch.setattr(gpu, "STOPPED", stopped)
    monkeypatch.setattr(gpu, "run_apart", stops)
    assert gpu.run_all(["limits", "stage1"], tmp_path, limit_s=100, total_s=100) == ({}, True)
    assert begun == ["limits"] and not list(tmp_path.iterdir())


def test_a_process_that_cannot_be_killed_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "end_marked", lambda mark: None)
    log, started = tmp_path / "log", time.monotonic()
    status = run_within(0.5, ["bash", "-c", "echo $$; exec sleep 60"], log=log, cwd=tmp_path)
    psutil.Process(int(log.read_text())).kill()
    assert status is None and time.monotonic() - started < 30


PYTHON = """#!/bin/bash
[ "$2" = pip ] && exec sleep 1.1
trap 'test -d "$TMPDIR" && echo in time >>log; exit 143' TERM
echo "$TMPDIR $*" >log
for _ in {1..400}; do sleep 0.1; done
"""


def test_a_signal_to_the_script_reaches_the_parts_first_and_its_total_counts_what_it_installs(tmp_path: Path) -> None:
    for path, text in {"bin/python3": PYTHON, ".wheels/one.whl": "", "tools/gpu.sh": ""}.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    (tmp_path / "bin/python3").chmod(0o755)
    shutil.copy(ROOT / "tools/gpu.sh", tmp_path / "tools")
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TOTAL": "530"}
    log, started = tmp_path / "log", int(time.time())
    with subprocess.Popen(["bash", "tools/gpu.sh", "out"], cwd=tmp_path, env=environment) as process:
        end = time.monotonic() + 60
        while not (log.exists() and log.read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        asked = time.time()
        process.terminate()
        assert process.wait(30) == 143
    called, heard = log.read_text().splitlines()
    scratch, *words = called.split()
    assert heard == "in time" and not Path(scratch).exists()
    assert words[:3] == ["tools/gpu.py", "out", "--end"] and started + 530 <= int(words[3]) < asked - 1 + 530


def test_all_parts_are_over_within_the_20_minutes_that_the_page_names() -> None:
    alone = [part.limit_s for part in gpu.PARTS.values() if part.alone]
    together = [part.limit_s for part in gpu.PARTS.values() if not part.alone]
    to_end_s = (1 + len(alone)) * (family.NUM_TRIES + family.HUNG_S)
    assert max(together) + sum(alone) + to_end_s + gpu.KEPT_BACK_S <= 20 * 60


def test_no_part_is_begun_without_time_for_it_and_earlier_figures_stay(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"limits": {"device": "a GPU"}}))
    figures, failed = gpu.run_all(["limits", "stage1"], tmp_path, limit_s=100, total_s=20)
    assert failed
    assert figures["limits"] == {"device": "a GPU", "failed": "no time was left for it"}
    assert gpu.has_failed(figures["stage1"])
    assert json.loads((tmp_path / "gpu.json").read_text()) == figures


def test_a_stage_that_is_repeated_keeps_its_other_variants_and_their_failures_are_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = {"eager": MEASURED, "tf32": {"failed": "why"}, "failed": "why", "seconds": 2}
    (tmp_path / "gpu.json").write_text(json.dumps({"stage1": earlier}))
    monkeypatch.setattr(gpu, "run_apart", lambda *_: {"fp32": MEASURED, "seconds": 3})
    figures, failed = gpu.run_all(["stage1"], tmp_path, limit_s=100, total_s=100)
    assert figures["stage1"] == {"eager": MEASURED, "tf32": {"failed": "why"}, "fp32": MEASURED, "seconds": 3}
    assert not failed


def test_figures_of_two_calls_are_not_mixed_in_a_part() -> None:
    over, earlier = {"failed": ["not over within 130 s"], "seconds": 150.0}, {"passed": 120, "skipped": 3}
    assert gpu.with_earlier("tests", earlier, over) == over
    for not_run in (gpu.NO_TIME, {"skipped": "needs CUDA"}):
        assert gpu.with_earlier("tests", earlier, not_run) == {**earlier, **not_run}


@pytest.fixture
def given(scene_shards: Path, tmp_path: Path) -> Path:
    """A folder with the grid of one run of two steps."""
    common = [word for word in scene_overrides(scene_shards, tmp_path) if not word.startswith("run_dir=")]
    common += ["stage1.trainer.num_steps=2", "evaluation.max_images=2"]
    grid = {"baseline": "stage1", "seeds": [0], "common": common, "runs": {"stage1": {"settings": ["stages=[stage1]"]}}}
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "grid.yaml").write_text(json.dumps(grid))
    return folder


def test_a_grid_that_is_given_is_evidence(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIDENCE", str(given))
    (tmp_path / "out").mkdir()
    figures = gpu.run_apart("evidence", tmp_path / "out", 600)
    assert not gpu.has_failed(figures) and figures["runs"]["stage1"]["seeds"] == [0], figures
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evidence_summary.json", "evidence_report.md", "evidence.log"
    }  # fmt: skip


def test_a_grid_does_not_begin_without_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIDENCE", str(tmp_path))
    assert evidence.evidence(tmp_path, limit_s=110) == {"skipped": "at least 120 s are needed, 110 s are left"}
    assert not (tmp_path / "evidence.log").exists()


@pytest.mark.slow
def test_all_of_it_runs_at_toy_size(given: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = run(folder, timeout_s=1800, EVIDENCE=str(given))
    figures = json.loads((folder / "gpu.json").read_text())
    failed = {name: figures[name] for name in gpu.PARTS if gpu.has_failed(figures[name])}
    assert done.returncode == 0 and not failed, (failed, done.stderr[-2000:])
    assert len(list(folder.iterdir())) <= 8
    assert figures["evidence"]["runs"]["stage1"]["seeds"] == [0]
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
