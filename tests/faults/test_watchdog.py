"""A rank that hangs, or is gone, is named with host and phase, and the run ends within a bound, to be started again."""

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from iccld.runtime.faults.heartbeat import read_heartbeat
from iccld.runtime.faults.preemption import STOPPED_BY_WATCHDOG
from tests.faults.ranks import Ranks, events
from tests.faults.test_preemption import overrides, statuses

pytestmark = pytest.mark.distributed
LIMIT_S = 6.0
SETTINGS = ["watchdog.beat_s=0.5", f"watchdog.step_s={LIMIT_S}", "watchdog.save_s=8", "stages=[stage1]"]
BOUND_S = LIMIT_S + 15  # the waiting ranks' patience and the machine's


def said(ranks: Ranks) -> str:
    """The watchdogs' lines."""
    return "\n".join(line for line in ranks.log().splitlines() if line.startswith("watchdog: "))


@pytest.mark.parametrize(
    ("fault", "more", "phase"),
    [
        ({"at": "data", "do": "sleep"}, ["data.num_workers=1"], "data"),  # a loader worker
        ({"at": "forward", "do": "sleep"}, [], "forward"),
        ({"at": "prepare", "do": "collective"}, [], "prepare"),
        ({"at": "save", "do": "sleep"}, [], "save"),  # in the background; the next save waits for it
    ],
    ids=["data", "forward", "collective", "save"],
)
def test_a_rank_that_hangs_is_named(
    scene_shards: Path, tmp_path: Path, fault: dict[str, Any], more: list[str], phase: str
) -> None:
    run_dir, fault = tmp_path / "run", {**fault, "rank": 1, "step": 2}
    command = overrides(scene_shards, run_dir, *SETTINGS)
    with Ranks([*command, *more], tmp_path / "logs", fault=fault) as ranks:
        ranks.until_said(f"FAULT at {fault['at']} of step 2")
        begin = time.monotonic()
        assert ranks.wait() == [STOPPED_BY_WATCHDOG] * 2
        assert time.monotonic() - begin < BOUND_S + 8 * (phase == "save")
        lines = said(ranks)
    step = 3 if phase == "save" else 2
    named = rf"rank 1 on n1 \(process \d+\) stopped in phase {phase} of stage1 step {step}, \d+ s ago"
    assert re.search(named, lines), lines
    others_wait = re.sub(r"; rank 0 on n0 \(process \d+\) (waits|its collective failed .*) in .*", "", lines)
    assert "rank 0 on n0" not in others_wait, lines
    stacks = (run_dir / "logs/stacks_rank_00001.txt").read_text()
    assert ("in fail" in stacks) == (fault["at"] != "data"), "the line that hangs; a worker is another process"
    noted = [event for event in events(run_dir) if event["event"] == "stopped"]
    assert [event["rank"] for event in noted] == [1] and noted[0]["sure"]
    assert (noted[0]["host"], noted[0]["phase"], noted[0]["step"]) == ("n1", phase, step)
    assert statuses(command, tmp_path / "again", 2) == [0, 0], "the same command goes on"


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "gil"])
def test_a_rank_that_is_gone_or_runs_no_thread_is_named_by_the_others(
    scene_shards: Path, tmp_path: Path, how: str
) -> None:
    run_dir = tmp_path / "run"
    command = overrides(scene_shards, run_dir, *SETTINGS, steps=4000)
    fault = {"at": "forward", "rank": 1, "step": 2, "do": "gil"} if how == "gil" else {}
    with Ranks(command, tmp_path / "logs", fault=fault) as ranks:
        if how == "gil":
            ranks.until_said("FAULT at forward of step 2")
        else:
            ranks.until_said("step 3/4000")
            ranks.signal(signal.Signals[how], 1)
        begin = time.monotonic()
        assert ranks.processes[0].wait(60) == STOPPED_BY_WATCHDOG
        assert time.monotonic() - begin < BOUND_S
        lines = said(ranks)
        assert re.search(
            r"watchdog: rank 1 on n1 \(process \d+\) gives no sign of life .*, last in phase \w+ of stage1 step \d+",
            lines,
        ), ranks.log()[-3000:]
        if how == "gil":
            assert ranks.processes[1].wait(60) == 1
            assert "in fail" in ranks.log(), "its stacks, without the interpreter's lock"
    (event,) = [event for event in events(run_dir) if event["event"] == "stopped"]
    assert (event["rank"], event["host"]) == (1, "n1")


def test_a_rank_that_fails_is_named_by_the_one_whose_collective_it_breaks(scene_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fault = {"at": "prepare", "rank": 1, "step": 2, "do": "raise"}
    with Ranks(overrides(scene_shards, run_dir, *SETTINGS), tmp_path / "logs", fault=fault) as ranks:
        assert ranks.wait() == [STOPPED_BY_WATCHDOG, 1]
        lines, ended = said(ranks), "ended in phase prepare of stage1 step 2: RuntimeError: a fault"
        assert "rank 1 on n1" in lines and ended in lines, ranks.log()


def test_a_run_that_goes_on_is_left_alone(scene_shards: Path, tmp_path: Path) -> None:
    """Heartbeats move; what is slow within its phase's own limit is no hang, and nothing is left but the beats."""
    run_dir = tmp_path / "run"
    fault = {"at": "evaluate", "do": "slow", "seconds": 2 * LIMIT_S}
    command = overrides(scene_shards, run_dir, *SETTINGS, validation=True, steps=3)
    with Ranks(command, tmp_path / "logs", fault=fault) as ranks:
        assert ranks.wait() == [0, 0]
        assert not said(ranks)
    assert sorted(path.name for path in (run_dir / "heartbeats").iterdir()) == ["rank_00000.json", "rank_00001.json"]
    for rank in range(2):
        heartbeat = read_heartbeat(run_dir, rank)
        assert heartbeat is not None and heartbeat.host == f"n{rank}" and heartbeat.beat > 10
        assert (heartbeat.stage, heartbeat.phase, heartbeat.ended) == ("evaluation", "evaluate", "in order")
    assert not (run_dir / "logs").exists()
    assert json.loads((run_dir / "report/results.json").read_text())["stage1"]


def test_a_node_that_cannot_read_its_shards_is_named_before_the_run(scene_shards: Path, tmp_path: Path) -> None:
    run_dir, fault = tmp_path / "run", {"at": "shards", "rank": 1, "do": "raise"}
    with Ranks(overrides(scene_shards, run_dir), tmp_path / "logs", fault=fault) as ranks:
        assert ranks.wait() == [STOPPED_BY_WATCHDOG] * 2
        assert "preflight: n1: shards: a fault of the program; leave the node out (--exclude)" in ranks.log()
    _launched, event = events(run_dir)
    assert (event["event"], event["host"]) == ("unfit", "n1") and not (run_dir / "stage1").exists()
