"""Started on every rank by `launch.run_jobs`: trains one job after another in this process.

A job is `{"overrides": [...], "stop_at": step or null, "record": folder or null, "engine": name or null}`. `stop_at`
asks for a stop at that step boundary, as a signal would; `record` keeps every prepared tensor by sample number;
`engine` trains under another engine than the launch's. A job may also be `{"checks": module, "arguments": [...]}`: the
module's `main` is called.
"""

import gc
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from iccld.config import load_config
from iccld.programs.train import train as program
from iccld.runtime.faults.ending import run_to_the_end
from iccld.runtime.faults.preemption import Preemption
from iccld.stages.base import Stage, StageInputs

ENGINES = {
    "ddp": {},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_MIN_NUM_PARAMS": "1000"},
}
"""Variables that accelerate's launcher leaves in the environment of a rank."""


class StopAt(Preemption):
    """Request to stop: it is asked once a step, and says yes at the `stop_at`-th time."""

    def __init__(self, stop_at: int | None) -> None:
        self.remaining = stop_at

    @property
    def requested(self) -> bool:  # type: ignore[override]
        if self.remaining is None:
            return False
        self.remaining -= 1
        return self.remaining == 0


def recording(stage: Stage, folder: Path) -> Stage:
    """Keep what `prepare` returns, a file a micro-batch."""
    prepare = type(stage).prepare

    def prepare_and_keep(self: Stage, batch: Any, step: int) -> StageInputs:
        inputs = prepare(self, batch, step)
        if next(self.module.parameters()).is_meta:
            return inputs
        numbers = batch["source"]["numbers"]
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.name}_{step:04d}_{int(numbers[0]):06d}.pt"
        torch.save({"numbers": numbers, "keys": batch["source"]["keys"], **inputs.tensors}, folder / name)
        return inputs

    stage.__class__ = type(type(stage).__name__, (type(stage),), {"prepare": prepare_and_keep})
    return stage


def run(job: dict[str, Any]) -> None:
    build_stage = program.build_stage
    program.Preemption = lambda: StopAt(job.get("stop_at"))  # type: ignore[assignment,misc]
    program._flops = lambda *_: lambda step: 0.0  # takes as long as ten steps
    if job.get("record"):
        program.build_stage = lambda *args: recording(build_stage(*args), Path(job["record"]))  # type: ignore[assignment]
    try:
        program.train(load_config(job["overrides"]))
    finally:
        program.build_stage = build_stage
        program.Preemption = Preemption  # type: ignore[misc]


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # an engine collects garbage, of which libraries have none
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job.get("engine"):
            for name in {name for of_engine in ENGINES.values() for name in of_engine}:
                os.environ.pop(name, None)
            os.environ.update(ENGINES[job["engine"]])
        if job.get("checks"):
            import_module(job["checks"]).main(*job["arguments"])
        else:
            run(job)


if __name__ == "__main__":
    run_to_the_end(main)
