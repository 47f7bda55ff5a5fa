"""`micro_batch_size: auto` in real runs: it fits, leaves no trace, and stays what it was when a run goes on."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_jobs
from tests.distributed.test_resume import STOP, assert_equal_weights, losses, overrides
from tests.factory import scene_overrides
from tests.faults.ranks import events
from tests.forked import Forked

pytestmark = pytest.mark.distributed


def choices(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in events(run_dir) if event["event"] == "micro_batch_size"]


@pytest.mark.parametrize(
    "engine", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("fsdp2", marks=pytest.mark.slow)]
)
def test_a_run_after_auto_equals_one_with_that_number_to_the_bit(
    scene_shards: Path, tmp_path: Path, engine: str
) -> None:
    """A resumed run keeps the number, even if it would now choose a smaller one; not on another number of ranks."""
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

    def train(size: str, *, limit: int) -> tuple[int, list[str]]:
        run_dir, log = tmp_path / f"{size}_{limit}", tmp_path / f"log_{size}_{limit}"
        settings = [*scene_overrides(scene_shards, run_dir), "stages=[stage1]"]
        settings += [f"stage1.trainer.{s}" for s in ("num_steps=2", "global_batch_size=32", f"micro_batch_size={size}")]
        settings += ["data.crop_size=[64,128]", "data.validation.shards="]
        process = Forked("iccld", ["train", *settings], environment=dict(os.environ), log=log)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
        return process.wait(300), log.read_text().splitlines()

    def chosen(limit: int) -> dict[str, Any]:
        status, said = train("auto", limit=limit)
        assert status == 0, said
        (choice,) = choices(tmp_path / f"auto_{limit}")
        assert any(f"stage1.trainer.micro_batch_size: auto -> {choice['chosen']} (" in line for line in said)
        return choice

    largest = chosen(8 << 30)
    assert largest["chosen"] == 32
    alone, all_at_once = (int(largest["peak_bytes"][size]) for size in ("1", "32"))
    size = chosen(all_at_once)["chosen"]  # some of the limit is kept for heaps
    assert 32 > size > 1 and 32 % size == 0
    # The trial of 32 held what earlier ones had left: a process of its own needs 0.5 to 0.6 of the difference.
    status, said = train("32", limit=alone + (all_at_once - alone) // 4)
    assert status == 2 and said[-1].startswith("iccld train: out of memory: rank 0"), said
    assert not [line for line in said[:-1] if not line.startswith(("starting", "stage1"))], said
