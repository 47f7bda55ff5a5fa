"""Told to stop, a job saves, is requeued, and goes on as if nothing had been."""

import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import PacedRun, assert_same_run, events


def wait_for_stop(run: PacedRun, count: int, timeout_s: float) -> None:
    wait_until(lambda: len(events(run.run_dir, "preempted")) == count, timeout_s, f"stop {count}", run.tail)


def assert_nothing_done_twice(run_dir: Path, *, stops: int) -> None:
    """Each attempt begins with the step before which the last one stopped, or the stage."""
    met = [event for event in events(run_dir) if event["event"] in ("preempted", "started")]
    places = [place for place, event in enumerate(met) if event["event"] == "preempted"]
    assert len(places) == stops
    for place in places:
        stopped, begun = met[place], met[place + 1]
        assert (begun["event"], begun["stage"]) == ("started", stopped["stage"])
        assert begun["step"] == stopped.get("step", 0)


def test_the_time_limit_twice_in_a_row(cluster: Cluster, scene_shards: Path, undisturbed: Path, tmp_path: Path):
    run = PacedRun(cluster, scene_shards, tmp_path)
    job = run.submit("--lead-s", "60")
    for attempt in (1, 2):
        run.pace(0.5)
        run.wait_for_step(3 * attempt - 1, attempt=attempt)
        run.pace(8)  # SLURM looks at its limits every 30 s
        end = time.strftime("%FT%T", time.localtime(time.time() + 45))
        cluster.run("scontrol", "update", f"jobid={job}", f"EndTime={end}")
        wait_for_stop(run, attempt, 60)
        cluster.run("scontrol", "update", f"jobid={job}", "TimeLimit=60")  # or the next attempt would have that end too
    run.finish()
    assert cluster.fact(job, "Restarts") == "2"
    assert f"job {job}, restart 2" in run.log and "restart 0" in run.log
    assert_nothing_done_twice(run.run_dir, stops=2)
    assert_same_run(undisturbed, run.run_dir)


@pytest.mark.parametrize("launcher", ["srun", "accelerate"])
def test_preemption_by_sigterm(cluster: Cluster, scene_shards: Path, undisturbed: Path, tmp_path: Path, launcher: str):
    run = PacedRun(cluster, scene_shards, tmp_path)
    job = run.submit("--launcher", launcher)
    run.wait_for_step(2, stage="stage2")
    cluster.run("scancel", "--signal=TERM", job)
    wait_for_stop(run, 1, 30)
    run.finish()
    assert cluster.fact(job, "Restarts") == "1"
    assert_nothing_done_twice(run.run_dir, stops=1)
    assert_same_run(undisturbed, run.run_dir)


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    run = PacedRun(cluster, scene_shards, tmp_path)
    job = run.submit(nodes=1)
    run.wait_for_step(2)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    time.sleep(2)
    assert cluster.fact(job, "JobState") == "CANCELLED" and cluster.fact(job, "Restarts") == "0"
