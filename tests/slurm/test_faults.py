"""Nodes, processes and daemons that are lost: the job is requeued and ends with the weights of an undisturbed one."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import STAGES, PacedRun, assert_same_run, iccld

LIMIT_S = 120  # from the loss of something to the finished job
FIRST_STAGE = ("stage1",)  # in which the faults come; `test_a_node_set_down` goes on into stage 2


@pytest.fixture
def run(request: pytest.FixtureRequest, cluster: Cluster, scene_shards: Path, tmp_path: Path) -> PacedRun:
    """Two nodes, past the first checkpoint of stage 1."""
    run = PacedRun(cluster, scene_shards, tmp_path, stages=getattr(request, "param", FIRST_STAGE))
    run.submit()
    run.wait_for_step(5)
    return run


def second_node(run: PacedRun) -> str:
    """A node of the job that the batch shell is not on."""
    nodes = run.cluster.run("scontrol", "show", "hostnames", run.cluster.fact(run.jobs[0], "NodeList")).split()
    return next(node for node in nodes if node != run.cluster.fact(run.jobs[0], "BatchHost"))


def assert_goes_on(run: PacedRun, undisturbed: Path, since: float) -> None:
    wait_until(lambda: run.has_restarted, LIMIT_S, "the next attempt", run.tail)
    run.finish()
    assert time.monotonic() - since < LIMIT_S
    assert_same_run(undisturbed, run.run_dir, run.stages)


@pytest.mark.parametrize("run", [STAGES], indirect=True, ids=["both stages"])
def test_a_node_set_down(run: PacedRun, undisturbed: Path):
    node, since = second_node(run), time.monotonic()
    run.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        assert_goes_on(run, undisturbed, since)
        assert f"node {node} failed: down while the job ran on it" in run.log
    finally:
        run.cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)


def test_a_node_whose_processes_are_killed(run: PacedRun, undisturbed: Path):
    """Daemon, step daemon and rank at once, as where a machine dies."""
    node, since = second_node(run), time.monotonic()
    run.cluster.daemons[node].kill()
    run.cluster.daemons[node].wait(10)
    kill(run.cluster.step_daemons(node), run.cluster.processes(node))
    try:
        assert_goes_on(run, undisturbed, since)
        assert f"node {node} failed" in run.log
    finally:
        run.cluster.start_node(node)


def test_a_step_daemon_killed_with_its_rank(run: PacedRun, undisturbed: Path):
    """srun would wait for the dead daemon for ever."""
    node, since = second_node(run), time.monotonic()
    kill(run.cluster.step_daemons(node), run.cluster.processes(node))
    assert_goes_on(run, undisturbed, since)
    assert "srun is left behind" in run.log


def test_a_step_daemon_killed_while_its_node_and_its_rank_live(run: PacedRun, undisturbed: Path):
    """SLURM does not notice, and srun would wait for ever: the rank that has lost its daemon ends the attempt."""
    since = time.monotonic()
    kill(run.cluster.step_daemons(second_node(run)))
    assert_goes_on(run, undisturbed, since)
    assert "lost the process that started it" in (run.run_dir / "events.jsonl").read_text()


@pytest.mark.parametrize(
    ("at", "do", "phase"),
    [("data", "sleep", "data"), pytest.param("prepare", "collective", "prepare", marks=pytest.mark.slow)],
    ids=["data", "collective"],
)
def test_a_rank_that_hangs_is_named_with_its_node(
    cluster: Cluster, scene_shards: Path, undisturbed: Path, tmp_path: Path, at: str, do: str, phase: str
):
    """Rank 1 hangs in the job's first attempt: in a loader worker, or in a collective alone."""
    run = PacedRun(cluster, scene_shards, tmp_path, pace_s=0, stages=FIRST_STAGE)
    run.words += ["watchdog.step_s=12", "data.num_workers=1"]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -m tests.slurm.faulty_rank "$@"\n')
    python.chmod(0o755)
    fault = json.dumps({"at": at, "do": do, "rank": 1, "step": 4})
    run.submit("--python", str(python), variables={"FAULT": fault, "FAULT_GLOBAL_BATCH": "2"})
    wait_until(lambda: f"FAULT at {at} of step 4" in run.log, 150, "the fault", run.tail)
    node, since = second_node(run), time.monotonic()
    assert_goes_on(run, undisturbed, since)
    named = rf"watchdog: .*rank 1 on {node} \(process \d+\) stopped in phase {phase} of stage1 step 4, \d+ s ago"
    assert re.search(named, run.log)
    if do != "collective":  # of two ranks that wait for each other, neither is to blame
        assert f"node {node} failed" in run.log


def test_a_killed_rank_is_named_with_its_node_and_the_node_excluded_the_second_time(run: PacedRun, undisturbed: Path):
    node, ledger = second_node(run), run.run_dir / "slurm" / "failed_nodes"
    ledger.write_text(f"{node}\t2026-01-01 00:00:00\tjob 99, restart 0\tkilled\n")
    kill(run.cluster.processes(node, program="iccld.programs.rank"))
    wait_until(lambda: run.has_restarted, LIMIT_S, "the next attempt", run.tail)
    assert f"node {node} failed" in run.log and f"the next attempt is not on {node}\n" in run.log
    assert run.cluster.fact(run.jobs[-1], "ExcNodeList") == node
    assert f"#SBATCH --exclude={node}\n" in iccld(run.cluster, "submit", "--dry-run", *run.words)
    run.finish()
    assert_same_run(undisturbed, run.run_dir, run.stages)


def test_a_broken_job_is_not_requeued_for_ever(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    run = PacedRun(cluster, scene_shards, tmp_path, stages=FIRST_STAGE)
    job = run.submit("--python", "/bin/false", "--max-stalled", "2")
    assert cluster.wait(job) == "FAILED"
    assert cluster.fact(job, "Restarts") == "1"
    assert "2 attempts without a newer checkpoint; not started again" in run.log
    assert not (run.run_dir / "slurm" / "failed_nodes").exists()  # both nodes failed alike


def kill(*processes: list[int]) -> None:
    found = [pid for group in processes for pid in group]
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)
