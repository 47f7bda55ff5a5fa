"""`train --multirun` with submitit: a job of SLURM for each run, in a real queue."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factory import scene_overrides
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.jobs import ROOT


def command(shards: Path, sweep: Path, *words: str) -> list[str]:
    settings = [*scene_overrides(shards, sweep), "stages=[stage1]", *words]
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"]
    return [sys.executable, "-m", "iccld", "train", "--multirun", *settings, *launcher]


def environment(cluster: Cluster) -> dict[str, str]:
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**cluster.environment, "PYTHONPATH": python_path}


@pytest.mark.slow
def test_each_run_is_a_job_and_one_that_fails_is_named(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep = tmp_path / "sweep"
    (sweep / "seed_1/stage1").mkdir(parents=True)
    (sweep / "seed_1/config.yaml").write_text("seed: 7\n")
    words = command(scene_shards, sweep, "stage1.trainer.num_steps=2", "seed=0,1")
    done = subprocess.run(words, env=environment(cluster), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "seed_0: finished" in done.stdout and "seed_1: failed with exit status 2" in done.stderr
    assert "miou" in json.loads((sweep / "seed_0/report/results.json").read_text())["stage1"]


@pytest.mark.slow
def test_a_job_whose_time_is_over_goes_on_on_another_node(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = command(scene_shards, tmp_path, "data.validation.shards=", "stage1.trainer.num_steps=150,1")
    events = tmp_path / "num_steps_150/events.jsonl"
    with subprocess.Popen(words, env=environment(cluster), stdout=-1, stderr=subprocess.STDOUT, text=True) as sweep:
        try:
            wait_until(lambda: events.is_file() and '"progress"' in events.read_text(), 200, "a step", cluster.tail)
            wait_until(lambda: len(cluster.run("squeue", "-h").splitlines()) == 1, 100, "one job", cluster.tail)
            job, node = cluster.run("squeue", "-h", "-o", "%A %N").split()
            cluster.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
            cluster.run("scancel", "--signal=USR2", job)  # as submitit has it sent before the end of the time
            wait_until(lambda: cluster.fact(job, "Restarts") == "1", 100, "the queueing again", cluster.tail)
            said = sweep.communicate(timeout=250)[0]
            other = cluster.fact(job, "NodeList")
            cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
        finally:
            sweep.kill()
    assert sweep.returncode == 0 and "num_steps_150: finished" in said, said
    assert other != node
    kinds = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert kinds.count("launched") == 2 and kinds.count("preempted") == 1 and kinds[-1] == "finished"
