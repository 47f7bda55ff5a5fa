"""`train --multirun` with submitit: a job of SLURM for each run, in a real queue."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factory import scene_overrides
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT


@pytest.mark.slow
def test_each_run_is_a_job_and_one_that_fails_is_named(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep = tmp_path / "sweep"
    (sweep / "seed_1/stage1").mkdir(parents=True)
    (sweep / "seed_1/config.yaml").write_text("seed: 7\n")
    settings = [*scene_overrides(scene_shards, sweep), "stages=[stage1]", "stage1.trainer.num_steps=2"]
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1"]
    command = [sys.executable, "-m", "iccld", "train", "--multirun", *settings, *launcher, "seed=0,1"]
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**cluster.environment, "PYTHONPATH": python_path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "seed_0: finished" in done.stdout and "seed_1: failed with exit status 2" in done.stderr
    assert "miou" in json.loads((sweep / "seed_0/report/results.json").read_text())["stage1"]
