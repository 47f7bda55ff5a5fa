"""Files that a rank of a job leaves for the job script, without a cluster."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iccld.cli import main
from iccld.programs import rank
from iccld.runtime.faults.preemption import STOPPED_BY_WATCHDOG
from tests.factory import scene_overrides
from tests.ports import free_port
from tests.slurm.cluster import wait_until
from tests.slurm.jobs import events


def start(run_dir: Path, *words: str, num_ranks: int = 1, **variables: str) -> subprocess.Popen[str]:
    """Rank 0 on node gpu01, which has given its first sign of life."""
    job = run_dir / "slurm" / "job_7"
    (alive := job / "alive").mkdir(parents=True)
    formed = {"RANK": "0", "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    told = {"ICCLD_OUTCOME": f"{job}/outcome", "ICCLD_ALIVE": str(alive), "SLURMD_NODENAME": "gpu01"}
    process = subprocess.Popen(
        [sys.executable, "-m", "iccld.programs.rank", *words],
        env=os.environ | formed | {"MASTER_PORT": str(free_port())} | told | variables,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((alive / "gpu01_0").exists, 60, "a sign of life")
    return process


def test_scoring_that_is_preempted_while_it_starts_says_so(scene_shards: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    quick = ["stages=[stage1]", "stage1.trainer.num_steps=1", "inference.num_steps=[1]"]
    assert main(["train", *scene_overrides(scene_shards, run_dir), *quick]) == 0
    process = start(run_dir, "evaluate", str(run_dir))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 0
    assert (run_dir / "slurm" / "job_7" / "outcome").read_text() == "85\n"
    assert events(run_dir)[-1]["event"] == "preempted" and events(run_dir)[-1]["stage"] == "evaluation"


def test_a_command_that_cannot_be_parsed_is_refused_and_not_tried_again(tmp_path: Path):
    formed = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    (outcome := tmp_path / "slurm/job_7/outcome").parent.mkdir(parents=True)
    command = [sys.executable, "-m", "iccld.programs.rank", "train", "--extnd"]
    done = subprocess.run(command, env=os.environ | formed | {"ICCLD_OUTCOME": str(outcome)}, check=False)
    assert done.returncode == 2 and outcome.read_text() == "2\n"


def test_nodes_on_which_no_rank_begins_are_named(tmp_path: Path):
    words = ["train", "model=tiny", "dataset=scenes", f"run_dir={tmp_path}"]
    process = start(tmp_path, *words, num_ranks=4, ICCLD_GATHER_S="3", ICCLD_HOSTS="gpu01 gpu02")
    (tmp_path / "slurm" / "job_7" / "alive" / "gpu01_1").write_text("1 1\n")
    _, said = process.communicate(timeout=60)
    assert process.returncode == STOPPED_BY_WATCHDOG
    assert "2 ranks have not begun (the first is rank 2), none on gpu02" in said
    assert [(event["event"], event["host"]) for event in events(tmp_path)] == [("unfit", "gpu02")]


@pytest.mark.parametrize(("cuda", "status"), [("12.8", STOPPED_BY_WATCHDOG), (None, 2)])
def test_a_node_without_its_gpus_is_named_and_a_torch_without_cuda_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, status: int
):
    (outcome := tmp_path / "slurm/job_7/outcome").parent.mkdir(parents=True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {
        "RANK": "0", "MASTER_ADDR": "127.0.0.1", "ICCLD_OUTCOME": str(outcome), "SLURMD_NODENAME": "gpu01",
        "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        assert rank.main(["train"]) == status and outcome.read_text() == f"{status}\n"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
    found = [(event["event"], event["host"], event["check"]) for event in events(tmp_path)] if cuda else []
    assert found == ([("unfit", "gpu01", "device")] if cuda else [])
