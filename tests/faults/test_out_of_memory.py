"""Out of memory for real, by a limit of the process's addresses: one message, a snapshot, and the end of all ranks."""

import json
import re
import time
from pathlib import Path

import pytest

from iccld.outcome import REFUSED
from iccld.runtime.checkpoint.manifest import verify
from tests.faults.ranks import Ranks, events
from tests.faults.test_preemption import overrides, statuses

pytestmark = pytest.mark.distributed
SETTINGS = ["watchdog.beat_s=0.5", "data.crop_size=[64,128]"]
BATCH = ["global_batch_size=16", "micro_batch_size=4"]
MIB = 2**20
# Tensors get memory of their own, and give it back, and no thread has addresses in reserve: the limit is met at once.
ENVIRONMENT = {"FAULT_GLOBAL_BATCH": "16", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def command(shards: Path, run_dir: Path) -> list[str]:
    batch = (f"stage1.trainer.{setting}" for setting in BATCH)
    synchronous = ["stages=[stage1]", "stage1.trainer.checkpoint.asynchronous=false"]
    return [*overrides(shards, run_dir, *SETTINGS, *batch), *synchronous]


def said(ranks: Ranks) -> list[str]:
    return [line for line in ranks.log().splitlines() if "out of memory" in line]


def test_one_rank_that_is_out_of_memory_ends_both_with_one_message(scene_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fault = {"at": "prepare", "rank": 1, "step": 2, "do": "limit", "bytes": 4 * MIB}
    settings = command(scene_shards, run_dir)
    environment = ENVIRONMENT | {"ICCLD_OUTCOME": str(tmp_path / "outcome")}  # as in a job
    with Ranks(settings, tmp_path / "logs", fault=fault, environment=environment, forked=False) as ranks:
        ranks.until_said("FAULT at prepare of step 2")
        begin = time.monotonic()
        assert ranks.wait() == [REFUSED, REFUSED], ranks.log()[-3000:]
        assert time.monotonic() - begin < 60, "no limit of the watchdog was waited for"
        (message,) = said(ranks)
        assert "Traceback" not in ranks.log() and "watchdog: " not in ranks.log()
    assert (tmp_path / "outcome").read_text() == "2\n", "the job is not started again"
    where = r"iccld: out of memory: rank 1 on n1 in phase prepare of stage1 step 2 "
    assert re.match(where + r"asked for [\d.]+ (MiB|KiB|bytes)", message), message
    assert "optimiser moments 3.0 MiB" in message and "activations and the rest" in message
    assert "stage1.trainer.micro_batch_size=2 (accumulation 2 -> 4, the global batch stays 16)" in message
    assert "model.encoder.activation_checkpointing=true" in message
    snapshot = json.loads((run_dir / "profile/out_of_memory_rank_00001.json").read_text())
    sizes = [tensor["bytes"] for tensor in snapshot["tensors"]]
    assert sizes == sorted(sizes, reverse=True)
    for part in ("weights", "averages", "optimiser moments"):
        assert sum(t["bytes"] for t in snapshot["tensors"] if t["part"] == part) == snapshot["parts"][part] > 0
    assert sum(snapshot["parts"].values()) == snapshot["peak"]
    (event,) = [event for event in events(run_dir) if event["event"] == "out_of_memory"]
    assert event["rank"] == 1 and event["parts"] == snapshot["parts"]
    assert verify(run_dir / "stage1/checkpoints/step_00000002").step == 2
    advice = ["stage1.trainer.micro_batch_size=2", "model.encoder.activation_checkpointing=true"]
    assert statuses([*settings, *advice], tmp_path / "again", 2) == [0, 0], "the advice is taken, and the run goes on"


def test_ranks_that_are_out_of_memory_alike_say_it_once(scene_shards: Path, tmp_path: Path) -> None:
    fault = {"at": "forward", "step": 1, "do": "limit", "bytes": 4 * MIB}
    settings = command(scene_shards, tmp_path / "run")
    with Ranks(settings, tmp_path / "logs", fault=fault, environment=ENVIRONMENT, forked=False) as ranks:
        assert ranks.wait() == [REFUSED, REFUSED], ranks.log()[-3000:]
        assert len(said(ranks)) == 1
