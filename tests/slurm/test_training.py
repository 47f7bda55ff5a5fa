"""Two nodes train both stages and score them; the weights are those of two processes on one machine."""

import json
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import assert_same_run, events, log_of, settings, submit, train_here


@pytest.mark.parametrize("launcher", ["srun", "accelerate"])
def test_two_nodes_end_with_the_weights_of_two_local_ranks(
    cluster: Cluster, scene_shards: Path, undisturbed: Path, tmp_path: Path, launcher: str
):
    [job] = submit(cluster, "--launcher", launcher, "train", *settings(scene_shards, tmp_path))
    assert cluster.wait(job) == "COMPLETED", log_of(tmp_path, job)
    assert "iccld: finished" in log_of(tmp_path, job)
    assert_same_run(undisturbed, tmp_path)
    here, there = (json.loads((run / "report/results.json").read_text()) for run in (undisturbed, tmp_path))
    assert here["stage2"] == there["stage2"]
    assert (tmp_path / "code_version.txt").is_file()
    assert "torch==" in (tmp_path / "slurm" / f"job_{job}" / "packages.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "fsdp2"])
def test_the_other_engines_too(cluster: Cluster, scene_shards: Path, tmp_path: Path, engine: str):
    here, there = tmp_path / "here", tmp_path / "there"
    [job] = submit(cluster, "--engine", engine, "train", *settings(scene_shards, there))
    train_here(settings(scene_shards, here), engine=engine)
    assert cluster.wait(job) == "COMPLETED", log_of(there, job)
    assert [event["layout"]["engine"] for event in events(there, "started")] == [engine] * 2
    assert_same_run(here, there)


def test_a_profile_of_two_nodes(cluster: Cluster, scene_shards: Path, tmp_path: Path):
    words = ["profile", "--num-steps", "3", "--num-warmup", "1", "--num-traced", "1", "stages=[stage1]"]
    [job] = submit(cluster, *words, *settings(scene_shards, tmp_path))
    assert cluster.wait(job) == "COMPLETED", log_of(tmp_path, job)
    folder = tmp_path / "profile/stage1"
    figures = json.loads((folder / "profile.json").read_text())
    assert figures["num_nodes"] == 2 and len({rank["host"] for rank in figures["ranks"]}) == 2
    assert all((folder / rank["trace"]).stat().st_size for rank in figures["ranks"])
    assert not (tmp_path / "stage1").exists()
