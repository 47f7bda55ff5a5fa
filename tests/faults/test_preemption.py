"""A request to stop, wherever the run is: nothing is lost, the status says so, and the same command goes on."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from iccld.outcome import FORCED
from iccld.runtime.checkpoint.manifest import verify
from tests.factory import scene_overrides
from tests.faults.ranks import Ranks, events

pytestmark = pytest.mark.distributed
STOPPED = 85


def overrides(shards: Path, run_dir: Path, *more: str, validation: bool = False, steps: int = 6) -> list[str]:
    lengths = (f"num_steps={steps}", "global_batch_size=4", "micro_batch_size=1", "checkpoint.save_every=2")
    settings = [f"stage{i}.trainer.{length}" for i in (1, 2) for length in lengths]
    scored = [] if validation else ["data.validation.shards="]
    return [
        *(*scene_overrides(shards, run_dir), *settings, *scored),
        *(f"preemption.exit_status={STOPPED}", "preemption.debounce_s=0.5", *more),
    ]


def statuses(command: list[str], folder: Path, num_ranks: int) -> list[int]:
    with Ranks(command, folder, num_ranks=num_ranks) as ranks:
        return ranks.wait()


def last(run_dir: Path) -> tuple[str, str]:
    event = events(run_dir)[-1]
    return event["event"], event["stage"]


@pytest.mark.parametrize("by", ["a second request", "grace"])
def test_forced_out_of_a_save_the_older_checkpoint_is_whole(scene_shards: Path, tmp_path: Path, by: str) -> None:
    run_dir = tmp_path / "run"
    command = overrides(scene_shards, run_dir, "stages=[stage1]")
    more = ["preemption.grace_s=3"] if by == "grace" else []
    fault = {"at": "save", "step": 4, "rank": 1, "do": "sleep"}
    with Ranks([*command, *more], tmp_path / "logs", fault=fault) as ranks:
        ranks.until_said("FAULT at save of step 4")
        ranks.until(lambda: (run_dir / "stage1/checkpoints/step_00000004.tmp/rank_00000.safetensors").exists())
        ranks.signal(signal.SIGTERM)
        if by != "grace":
            time.sleep(1)
            ranks.signal(signal.SIGTERM)
        assert ranks.wait(60) == [FORCED, FORCED]
        assert "rank 1 on n1 ends at once: " in ranks.log()
    names = {path.name for path in (run_dir / "stage1/checkpoints").iterdir()}
    assert names == {"step_00000002", "step_00000004.tmp", "latest"}
    assert verify(run_dir / "stage1/checkpoints/step_00000002").step == 2
    assert statuses(command, tmp_path / "again", 2) == [0, 0]
    assert [event["step"] for event in events(run_dir) if event["event"] == "started"] == [0, 2]
    assert (run_dir / "stage1/final").is_dir()


def test_asked_before_the_first_step(scene_shards: Path, tmp_path: Path) -> None:
    run_dir, fault = tmp_path / "run", {"at": "build", "do": "slow", "seconds": 1}
    command = overrides(scene_shards, run_dir, "stages=[stage1]", steps=2)
    with Ranks(command, tmp_path / "logs", fault=fault) as ranks:
        ranks.until_said("FAULT at build")
        ranks.signal(signal.SIGUSR1, 1)  # one rank alone
        assert ranks.wait() == [STOPPED, STOPPED]
    assert last(run_dir) == ("preempted", "stage1") and not (run_dir / "stage1/checkpoints").exists()
    assert statuses(command, tmp_path / "again", 2) == [0, 0]


def test_asked_between_the_stages_and_in_the_scoring(scene_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = overrides(scene_shards, run_dir, "inference.num_steps=[1]", validation=True, steps=2)
    with Ranks(command, tmp_path / "a", fault={"at": "hand_over", "do": "slow", "seconds": 1}) as ranks:
        ranks.until_said("FAULT at hand_over")
        ranks.signal(signal.SIGTERM)
        assert ranks.wait() == [STOPPED, STOPPED]
    assert last(run_dir) == ("preempted", "stage2")
    assert (run_dir / "stage1/final").is_dir() and not (run_dir / "stage2").exists()
    with Ranks(command, tmp_path / "b", fault={"at": "evaluate", "do": "slow", "seconds": 1}) as ranks:
        ranks.until_said("FAULT at evaluate")
        ranks.signal(signal.SIGTERM)
        assert ranks.wait() == [STOPPED, STOPPED]
    assert last(run_dir) == ("preempted", "evaluation") and not (run_dir / "report").exists()
    assert statuses(command, tmp_path / "c", 2) == [0, 0]
    assert (run_dir / "report/results.json").is_file()
    started = [event["stage"] for event in events(run_dir) if event["event"] == "started"]
    assert started == ["stage1", "stage2"], "no stage was begun twice"


def scores(run_dir: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "miou" in entry]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_score_in_mid_training_that_was_given_up_is_made_up_for(
    scene_shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The counts of the workers' loads are made up for too: every process of the job gets the signal."""
    more = ["stages=[stage1]", "stage1.trainer.evaluate_every=3", "data.num_workers=1", "metrics.wandb=offline"]
    more += ["stage1.trainer.checkpoint.save_every=4"]
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert statuses(overrides(scene_shards, whole, *more, validation=True), tmp_path / "a", 1) == [0]
    command = overrides(scene_shards, run_dir, *more, validation=True)
    with Ranks(command, tmp_path / "b", num_ranks=1, fault={"at": "evaluate", "do": "slow", "seconds": 2}) as ranks:
        ranks.until_said("FAULT at evaluate")
        process = psutil.Process(ranks.processes[0].pid)
        children = process.children(recursive=True)
        assert len({"wandb" in child.name() for child in children}) == 2, "loader workers, and wandb's own"
        for each in [*children, process]:
            each.send_signal(number)
        assert ranks.wait() == [STOPPED]
    assert scores(run_dir) == [] and last(run_dir) == ("preempted", "stage1")
    assert statuses(command, tmp_path / "c", 1) == [0]
    assert scores(run_dir) == scores(whole) and [entry["step"] for entry in scores(whole)] == [3, 6]
