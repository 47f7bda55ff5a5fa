"""One rank of `ranks.Ranks`: the command itself, with a fault done to the program around it.

FAULT is `{"at": place, "rank": rank or null, "step": step, "do": what}`: at that place of that step, the rank sleeps
("sleep"), keeps the interpreter's lock ("gil"), waits for a collective that no other rank joins ("collective"), raises
("raise"), says "FAULT" and sleeps for a moment ("slow"), or may take no more memory than "bytes" ("limit").
"""

import ctypes
import json
import os
import resource
import sys
import time
from typing import Any

import torch

from iccld.cli import main
from iccld.data.stream.domain import DomainStream
from iccld.programs.evaluate import scoring
from iccld.programs.profile import profile
from iccld.programs.train import fitness, train
from iccld.runtime.checkpoint import store as checkpoint
from iccld.runtime.faults.ending import run_to_the_end
from iccld.runtime.measure import host_memory

FAULT = json.loads(os.environ["FAULT"])
FOREVER_S = 300
_groups: list[Any] = []


def fail(place: str, step: int) -> None:
    if FAULT.get("at") != place or FAULT.get("rank") not in (None, int(os.environ["RANK"])):
        return
    if FAULT.get("step") not in (None, step):
        return
    print(f"FAULT at {place} of step {step}", flush=True)
    match FAULT["do"]:
        case "sleep":
            time.sleep(FOREVER_S)
        case "slow":
            time.sleep(FAULT["seconds"])
        case "gil":
            ctypes.PyDLL(None).sleep(FOREVER_S)  # PyDLL keeps the lock during the call
        case "collective":
            torch.distributed.barrier(group=_groups[0])
        case "limit":
            taken = host_memory.process_memory("VmSize")
            resource.setrlimit(resource.RLIMIT_AS, (taken + FAULT["bytes"], resource.RLIM_INFINITY))
            FAULT["at"] = ""  # once
        case "raise":
            raise RuntimeError("a fault of the program")


def wrap(owner: Any, name: str, place: str, step_of: Any) -> None:
    function = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        fail(place, step_of(*args))
        return function(*args, **options)

    setattr(owner, name, wrapped)


def wrap_method(owner: Any, name: str, place: str, step_of: Any) -> None:
    """Wrap a method of this object alone, by its class, so that a copy has its own; one on device meta is spared."""
    function = getattr(type(owner), name)

    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        if not next(getattr(self, "module", self).parameters()).is_meta:
            fail(place, step_of(*args))
        return function(self, *args, **options)

    owner.__class__ = type(type(owner).__name__, (type(owner),), {name: wrapped})


def faulty(build_stage: Any) -> Any:
    """The builder of a stage whose parts fail."""

    def build(*args: Any) -> Any:
        fail("build", 0)
        if torch.distributed.is_initialized():
            _groups.append(torch.distributed.new_group(backend="gloo"))
        stage = build_stage(*args)
        current = {"step": 0}

        def note(batch: Any, step: int) -> int:
            current["step"] = step
            return step

        wrap_method(stage, "prepare", "prepare", note)
        wrap_method(stage.module, "forward", "forward", lambda *_: current["step"])
        return stage

    return build


def inject() -> None:
    train.build_stage, profile.build_stage = faulty(train.build_stage), faulty(profile.build_stage)
    profile.fresh_stage = faulty(profile.fresh_stage)
    batch_size = int(os.environ.get("FAULT_GLOBAL_BATCH", "4"))
    wrap(DomainStream, "batch", "data", lambda self, numbers: int(numbers[0]) // batch_size)
    wrap(checkpoint, "write_runs", "save", lambda path, runs: int(path.parent.name[5:13]))
    wrap(scoring, "evaluate", "evaluate", lambda *_: 0)
    wrap(fitness, "read_shards", "shards", lambda *_: 0)
    wrap(train, "hand_over", "hand_over", lambda *_: 0)


if FAULT and __name__ in ("__main__", "__mp_main__"):  # a rank, or a loader worker of it
    inject()
if __name__ == "__main__":
    run_to_the_end(lambda: main(sys.argv[1:]))
