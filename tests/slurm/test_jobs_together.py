"""Another number of nodes in one run, arrays, and jobs that wait for one another."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_resume import losses
from tests.factory import scene_overrides
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import STEPS, PacedRun, events, log_of, settings, submit, train_here


def test_four_nodes_then_two_then_four(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    """One run, three jobs, each stopped by a signal but the last."""
    run = PacedRun(cluster, scene_shards, tmp_path, batch=4)
    for attempt, nodes in enumerate((4, 2, 4), start=1):
        job = run.submit("--no-requeue", nodes=nodes)
        if attempt < 3:
            run.wait_for_step(3 * attempt, attempt=attempt)
            cluster.run("scancel", "--signal=USR1", job)
            cluster.wait(job)
    run.finish()
    layouts = [event["layout"]["world_size"] for event in events(run.run_dir, "started")]
    assert layouts[:3] == [4, 2, 4]
    train_here(settings(scene_shards, tmp_path / "one", batch=4), num_ranks=1)
    here, there = losses(tmp_path / "one"), losses(run.run_dir)
    assert sum("loss" in entry for *_, entry in there) == 2 * STEPS
    for (stage, step, a), (_, _, b) in zip(here, there, strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=2e-3, abs=2e-5) for k in a if k.startswith("loss")), (stage, step)


def quick(shards: Path, run_dir: Path) -> list[str]:
    lengths = ("num_steps=1", "global_batch_size=1", "micro_batch_size=1")
    settings = [f"stage{i}.trainer.{length}" for i in (1, 2) for length in lengths]
    return [*scene_overrides(shards, run_dir), *settings, "inference.num_steps=[1]"]


def test_an_array_of_three_seeds_two_at_a_time(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    words = ["train", *quick(scene_shards, tmp_path / "runs"), "stages=[stage1]", "data.validation.shards="]
    [job] = submit(cluster, "--seeds", "3", "--max-running", "2", *words, nodes=1)
    most = 0

    def ended() -> bool:
        nonlocal most
        states = cluster.run("squeue", "-h", "-r", "-j", job, "-o", "%T", check=False).split()
        most = max(most, states.count("RUNNING"))
        return not states

    wait_until(ended, 150, "the array's end", cluster.tail)
    assert most == 2
    for seed in range(3):
        run_dir = tmp_path / "runs" / f"seed_{seed}"
        assert f"seed: {seed}\n" in (run_dir / "config.yaml").read_text()
        assert (run_dir / "stage1" / "final").is_dir(), log_of(tmp_path / "runs", f"{job}_{seed}")


def test_an_element_that_is_preempted_leaves_the_others_alone(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    """The last one, whose number is the array's own."""
    run = PacedRun(cluster, scene_shards, tmp_path)
    job = run.submit("--seeds", "3", nodes=1)
    logs = [run.run_dir / f"seed_{seed}" / "metrics.jsonl" for seed in range(3)]
    wait_until(lambda: all(path.exists() for path in logs), 150, "the first steps", cluster.tail)
    cluster.run("scancel", "--signal=USR1", f"{job}_2")
    wait_until(lambda: cluster.fact(f"{job}_2", "Restarts") == "1", 60, "the requeue", cluster.tail)
    others = [[cluster.fact(f"{job}_{i}", name) for name in ("JobState", "Restarts")] for i in range(2)]
    assert others == [["RUNNING", "0"]] * 2
    cluster.run("scancel", job)
    wait_until(lambda: not cluster.run("squeue", "-h", "-j", job, check=False), 60, "the array's end", cluster.tail)


def test_a_chain_and_a_finished_job_again(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    words = ["train", *quick(scene_shards, tmp_path)]
    jobs = submit(cluster, "--chain", *words, nodes=1)
    assert len(jobs) == 3
    assert [cluster.wait(job) for job in jobs] == ["COMPLETED"] * 3, log_of(tmp_path, jobs[-1])
    begins = [[int(cluster.fact(job, name)) for name in ("StartTime", "EndTime")] for job in jobs]
    assert begins[0][1] <= begins[1][0] and begins[1][1] <= begins[2][0]
    assert {"stage1", "stage2"} <= json.loads((tmp_path / "report/results.json").read_text()).keys()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    [again] = submit(cluster, *words, nodes=1)
    assert cluster.wait(again) == "COMPLETED"
    assert "stage2 is finished" in log_of(tmp_path, again)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["a b", "a'b", 'a"b', "a#b", "a%jb"])
def test_hostile_run_directories_reach_sbatch_as_they_are(cluster: Cluster, tmp_path: Path, name: str):
    """The log lies where it should, and the job says there that it ended."""
    run_dir = tmp_path / name
    words = ["train", "model=tiny", "dataset=scenes", f"run_dir={run_dir}", "stage1.trainer.micro_batch_size=1"]
    [job] = submit(cluster, "--python", "/bin/false", "--no-requeue", *words, nodes=1)
    assert cluster.wait(job) == "FAILED"
    [log] = (run_dir / "logs").iterdir()
    assert log.name.endswith(f"-{job}.log") and "iccld: not requeued, as was asked for" in log.read_text()


def test_a_failing_parent_leaves_no_child_waiting(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    words = ["train", *quick(scene_shards, tmp_path), f"data.source.shards={tmp_path}/nothing"]
    parent, child, grandchild = submit(cluster, "--chain", *words, nodes=1)
    assert cluster.wait(parent) == "FAILED"
    assert "refused; not started again" in log_of(tmp_path, parent)
    assert cluster.wait(child, timeout_s=60) == cluster.wait(grandchild, timeout_s=60) == "CANCELLED"
