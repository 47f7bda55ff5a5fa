"""Two nodes train both stages and score them; the weights are those of two processes on one machine."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_resume import losses
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import assert_same_weights, log_of, settings, submit, train_here


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_nodes_end_with_the_weights_of_two_local_ranks(
    cluster: Cluster, scene_shards: Path, tmp_path: Path, engine: str
):
    here, there = tmp_path / "here", tmp_path / "there"
    [job] = submit(cluster, "--engine", engine, "train", *settings(scene_shards, there))
    train_here(settings(scene_shards, here), engine=engine)
    assert cluster.wait(job) == "COMPLETED", log_of(there, job)
    assert "iccld: finished" in log_of(there, job)
    assert_same_weights(here, there)
    assert losses(there) == losses(here)
    for stage in ("stage1", "stage2"):
        path = f"{stage}/checkpoints/step_00000003/manifest.json"
        assert json.loads((there / path).read_text())["layout"] == json.loads((here / path).read_text())["layout"]
    results = json.loads((there / "report/results.json").read_text())
    assert {"stage1", "stage2"} <= results.keys()
