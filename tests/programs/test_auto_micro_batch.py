"""`micro_batch_size: auto` in real runs: it fits, leaves no trace, and stays what it was when a run goes on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import ROOT, run_jobs
from tests.distributed.test_resume import STOP, assert_equal_weights, losses, overrides
from tests.factory import scene_overrides
from tests.faults.ranks import events

pytestmark = pytest.mark.distributed


def choices(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in events(run_dir) if event["event"] == "micro_batch_size"]


@pytest.mark.parametrize(
    "engine", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("fsdp2", marks=pytest.mark.slow)]
)
def test_a_run_after_auto_equals_one_with_that_number_to_the_bit(
    scene_shards: Path, tmp_path: Path, engine: str
) -> None:
    """Also stopped and resumed, where it would now choose a smaller one; not on another number of ranks."""
    by_hand, chosen = tmp_path / "by_hand", tmp_path / "chosen"
    auto = [*overrides(scene_shards, chosen), *(f"stage{i}.trainer.micro_batch_size=auto" for i in (1, 2))]
    jobs = [
        {"overrides": overrides(scene_shards, by_hand, micro_batch_size=2)},
        {"overrides": auto, "stop_at": STOP},
        {"overrides": [*auto, "memory.share=1e-6", "stages=[stage1]"]},
        {"overrides": auto},
    ]
    run_jobs(jobs, num_processes=2, engine=engine)
    first, again, other = choices(chosen)
    assert first["num_accumulation"] == 1 and set(first["peak_bytes"]) == {"1", "2"}
    assert [(c["stage"], c["chosen"]) for c in (first, again, other)] == [("stage1", 2), ("stage1", 2), ("stage2", 2)]
    assert again["how"] == "as before" != other["how"]
    assert losses(chosen) == losses(by_hand)
    assert_equal_weights(chosen, by_hand)


def test_another_number_of_ranks_chooses_again(scene_shards: Path, tmp_path: Path) -> None:
    auto = [*overrides(scene_shards, tmp_path / "run"), "stage1.trainer.micro_batch_size=auto", "stages=[stage1]"]
    run_jobs([{"overrides": auto, "stop_at": STOP}], num_processes=2)
    run_jobs([{"overrides": auto}], num_processes=1)
    assert [event["chosen"] for event in choices(tmp_path / "run")] == [2, 4]


def test_other_activation_checkpointing_chooses_again(scene_shards: Path, tmp_path: Path) -> None:
    auto = [*overrides(scene_shards, tmp_path / "run"), "stage1.trainer.micro_batch_size=auto", "stages=[stage1]"]
    saving = "model.encoder.activation_checkpointing=true"
    run_jobs([{"overrides": [*auto, saving], "stop_at": STOP}, {"overrides": auto}], num_processes=1)
    assert [event["how"] == "as before" for event in choices(tmp_path / "run")] == [False, False]


def test_a_smaller_limit_gives_a_smaller_number_that_trains(scene_shards: Path, tmp_path: Path) -> None:
    """The limit is of the process's addresses, which end before its memory does; the largest number meets it."""

    def train(size: str, *, limit_mib: int) -> subprocess.CompletedProcess[str]:
        settings = [*scene_overrides(scene_shards, tmp_path / f"{size}_{limit_mib}"), "stages=[stage1]"]
        settings += [f"stage1.trainer.{s}" for s in ("num_steps=2", "global_batch_size=64", f"micro_batch_size={size}")]
        settings += ["data.crop_size=[64,128]", "data.validation.shards="]
        command = ["prlimit", f"--as={limit_mib * 2**20}", sys.executable, "-m", "iccld", "train", *settings]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    found = []
    for limit_mib in (8000, 1800):
        done = train("auto", limit_mib=limit_mib)
        assert done.returncode == 0, done.stdout + done.stderr
        (choice,) = choices(tmp_path / f"auto_{limit_mib}")
        assert f"stage1.trainer.micro_batch_size: auto -> {choice['chosen']} (" in done.stdout
        found.append(choice["chosen"])
    assert found[0] == 64 > found[1] >= 1 and 64 % found[1] == 0
    refused = train("64", limit_mib=1500)
    assert refused.returncode == 2
    assert refused.stderr.startswith("iccld train: out of memory: rank 0") and refused.stderr.count("\n") == 1
