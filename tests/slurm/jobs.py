"""Submitting small runs, and reading what became of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.distributed.test_resume import stored
from tests.factory import scene_overrides
from tests.slurm.cluster import Cluster

ROOT, STEPS = Path(__file__).parents[2], 3


def settings(shards: Path, run_dir: Path, *, steps: int = STEPS, save_every: int = 1000, batch: int = 2) -> list[str]:
    """Both stages and their scores, `steps` each."""
    lengths = (f"num_steps={steps}", f"global_batch_size={batch}", "micro_batch_size=1")
    return [
        *scene_overrides(shards, run_dir),
        *(f"stage{i}.trainer.{length}" for i in (1, 2) for length in (*lengths, f"checkpoint.save_every={save_every}")),
        "stage1.objective.confidence_threshold=0.06",
        "inference.num_steps=[1]",
    ]


def submit(cluster: Cluster, *words: str, nodes: int = 2) -> list[str]:
    """`iccld submit`, with a small allocation; the numbers of the jobs."""
    options = ["--nodes", str(nodes), "--cpus-per-task", "1", "--time", "10", "--lead-s", "60"]
    return re.findall(r"^job (\d+):", iccld(cluster, "submit", *options, *words), re.MULTILINE)


def iccld(cluster: Cluster, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "iccld", *words],
        env={**cluster.environment, "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def log_of(run_dir: Path, job: str) -> str:
    [log] = (run_dir / "logs").glob(f"*-{job}.log")
    return log.read_text()


def train_here(overrides: list[str], *, num_ranks: int = 2, engine: str = "ddp") -> None:
    """The same run by the local launcher."""
    launch = [sys.executable, str(ROOT / "launch" / "local.py"), str(num_ranks), "--engine", engine, "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, *overrides], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def assert_same_weights(expected: Path, run_dir: Path, *, steps: int = STEPS) -> None:
    """To the bit: everything in the last checkpoints, and the finished models."""
    for stage in ("stage1", "stage2"):
        one, two = (stored(run, stage, steps) for run in (expected, run_dir))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), stage
        for weights in ("teacher", "student"):
            one, two = (load_file(run / stage / "final" / weights / "model.safetensors") for run in (expected, run_dir))
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), (stage, weights)


def events(run_dir: Path, kind: str = "") -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if kind in ("", line["event"])]
