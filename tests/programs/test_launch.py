"""`iccld launch` by files that form a single process: as many ranks as were asked for, and their exit status."""

import os
import sys
from pathlib import Path

import pytest

from iccld.cli import main
from iccld.programs.launch import local
from tests.forked import Forked


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU"])
def test_an_engine_of_one_process_is_refused_more_ranks(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    (path := tmp_path / "own.yaml").write_text(f"distributed_type: {kind}\n")
    for engine in ("cpu", str(path)):
        assert main(["launch", "2", "--engine", engine, "train", "seed=x"]) == 2
        assert "forms one process; use ddp, or launch 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU"])
def test_a_single_process_is_the_launched_one(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    (path := tmp_path / "own.yaml").write_text(f"distributed_type: {kind}\nmixed_precision: bf16\nuse_cpu: true\n")
    executed = list[list[str]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "execv", lambda program, words: executed.append(words) or sys.exit(0))
        patch.setattr(os, "environ", environment := dict(os.environ))
        with pytest.raises(SystemExit):
            main(["launch", "1", "--engine", str(path), "train", "seed=1"])
    assert executed == [[sys.executable, "-m", "iccld", "train", "seed=1"]]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16" and environment["ACCELERATE_USE_CPU"] == "true"
    path.write_text(f"distributed_type: {kind}\ngpu_ids: '1'\n")
    assert main(["launch", "1", "--engine", str(path), "train", "seed=1"]) == 2
    assert "gpu_ids='1' has no effect here; leave it out" in capsys.readouterr().err


def test_a_single_process_ends_with_its_own_status(tmp_path: Path):
    log, words = tmp_path / "log", ["launch", "1", "--engine", "cpu", "train", "sed=1"]
    assert Forked("iccld", words, environment=dict(os.environ), log=log).wait(timeout=100) == 2
    assert "a fault of the program" not in log.read_text() and "sed" in log.read_text()


def test_ranks_share_the_cpus_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [local._threads(num_ranks) for num_ranks in (1, 2, 16)] == [8, 4, 1]
