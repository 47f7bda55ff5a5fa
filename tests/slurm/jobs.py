"""Submitting small runs, acting on them while they train, and reading what became of them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.distributed.test_resume import losses, stored
from tests.factory import scene_overrides
from tests.slurm.cluster import Cluster, wait_until

ROOT, STEPS = Path(__file__).parents[2], 8
STAGES = ("stage1", "stage2")


def settings(shards: Path, run_dir: Path, *, batch: int = 2) -> list[str]:
    """Settings of both stages and their scores, saved every 3 steps."""
    lengths = (f"num_steps={STEPS}", f"global_batch_size={batch}", "micro_batch_size=1", "checkpoint.save_every=3")
    return [
        *scene_overrides(shards, run_dir),
        *(f"stage{i}.trainer.{length}" for i in (1, 2) for length in lengths),
        "stage1.objective.confidence_threshold=0.06",
        "inference.num_steps=[1]",
    ]


def iccld(cluster: Cluster, *words: str, variables: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [*cluster.on_controller(), sys.executable, "-m", "iccld", *words],
        env={**cluster.environment, "PYTHONPATH": str(ROOT), **(variables or {})},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(cluster: Cluster, *words: str, nodes: int = 2, variables: dict[str, str] | None = None) -> list[str]:
    """`iccld submit`, with a small allocation; the numbers of the jobs."""
    options = ["--nodes", str(nodes), "--cpus-per-task", "1", "--time", "10", "--lead-s", "60"]
    said = iccld(cluster, "submit", *options, *words, variables=variables)
    return re.findall(r"^job (\d+):", said, re.MULTILINE)


def train_here(overrides: list[str], *, num_ranks: int = 2, engine: str = "ddp") -> None:
    """A run by the local launcher."""
    launch = [sys.executable, "-m", "iccld", "launch", str(num_ranks), "--engine", engine, "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


class PacedRun:
    """A run on the cluster that takes `pace_s` for each step, until it is let go."""

    def __init__(
        self,
        cluster: Cluster,
        shards: Path,
        folder: Path,
        *,
        pace_s: float = 1.0,
        batch: int = 2,
        stages: Sequence[str] = STAGES,
    ) -> None:
        self.cluster, self.run_dir, self.pace_file = cluster, folder / "run", folder / "pace"
        self.words = ["train", *settings(shards, self.run_dir, batch=batch), "watchdog.beat_s=1"]
        self.words += [f"stages=[{','.join(stages)}]"]
        self.stages = stages
        self.pace(pace_s)
        self.jobs: list[str] = []

    def pace(self, seconds: float) -> None:
        """Set the seconds of each step from the next one on."""
        self.pace_file.write_text(str(seconds))

    def submit(self, *options: str, nodes: int = 2, variables: dict[str, str] | None = None) -> str:
        paced = {"ICCLD_TEST_PACE": str(self.pace_file), "PYTHONPATH": f"{ROOT}:{Path(__file__).parent / 'pace'}"}
        self.jobs = submit(self.cluster, *options, *self.words, nodes=nodes, variables=paced | (variables or {}))
        return self.jobs[0]

    @property
    def log(self) -> str:
        return log_of(self.run_dir, self.jobs[-1])

    def wait_for_step(self, step: int, *, attempt: int = 1, stage: str = "stage1", timeout_s: float = 150) -> None:
        """Until the `attempt`-th attempt, over all jobs of the run, has logged that so many steps are done, or more."""

        def reached() -> bool:
            path = self.run_dir / "metrics.jsonl"
            lines = [line for line in path.read_text().splitlines(True) if line[-1] == "\n"] if path.exists() else []
            starts = [(event["stage"], event["step"]) for event in events(self.run_dir, "started")]
            if len(starts) < attempt or not lines:
                return False
            last = json.loads(lines[-1])
            place = (last["stage"], last["step"])
            return place >= (stage, step) and place > starts[-1]

        wait_until(reached, timeout_s, f"step {step} of attempt {attempt}", self.tail)

    @property
    def has_restarted(self) -> bool:
        return f"iccld: job {self.jobs[-1]}, restart 1" in self.log

    def finish(self, *, timeout_s: float = 150) -> None:
        """Let it go on at full speed, to its end."""
        self.pace(0)
        state = self.cluster.wait(self.jobs[-1], timeout_s=timeout_s)
        assert state == "COMPLETED", f"{state}\n{self.tail()}"
        assert "iccld: finished" in self.log

    def tail(self) -> str:
        logs = "\n".join(path.read_text()[-6000:] for path in (self.run_dir / "logs").glob("*.log"))
        return f"{self.cluster.tail()}\n{logs}"


def log_of(run_dir: Path, job: str) -> str:
    logs = list((run_dir / "logs").glob(f"*-{job}.log"))
    return logs[0].read_text() if logs else "no log"


def events(run_dir: Path, kind: str = "") -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if kind in ("", line["event"])]


def assert_same_run(expected: Path, run_dir: Path, stages: Sequence[str] = STAGES) -> None:
    """Compare to the bit: losses of every step, everything in the last checkpoints, and the finished models.

    `stages`: those of the run; the expected one may have more.
    """
    assert losses(run_dir) == [line for line in losses(expected) if line[0] in stages]
    for stage in stages:
        one, two = (stored(run, stage, STEPS) for run in (expected, run_dir))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), stage
        for weights in ("teacher", "student"):
            one, two = (load_file(run / stage / "final" / weights / "model.safetensors") for run in (expected, run_dir))
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), (stage, weights)
