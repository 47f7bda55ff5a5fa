"""Part correctness: short runs of both stages on tiny scenes, and what of them is equal to the bit.

Two plain runs, two deterministic ones, one of these resumed half-way, each sharded engine at one rank, and two ranks
that share the device. All start at once: each needs little of a GPU, and most of its time is Python's.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compare_runs import differences, lines

from gpu_parts.family import run_within

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS, SAVE_EVERY = 4, 2
TOLERANCE = 1e-3  # of losses between engines
TIMEOUT_S = 110.0 if torch.cuda.is_available() else 300.0  # of the runs that start together
RESUME_S = TIMEOUT_S / 2


@dataclass(frozen=True)
class Run:
    """A training by its settings; `launcher` takes the place of one plain process."""

    settings: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def _launched(engine: str, num_ranks: int) -> tuple[str, ...]:
    file = ROOT / "accelerate_configs" / f"{engine}.yaml"
    return ("accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(num_ranks),
            "--main_process_port", "0", "--module")  # fmt: skip


DETERMINISTIC = ("engine.deterministic=true",)
RUNS = {
    "plain": Run(),
    "again": Run(),
    "deterministic": Run(DETERMINISTIC),
    "deterministic_again": Run(DETERMINISTIC),
    **{engine: Run(launcher=_launched(engine, 1)) for engine in ("fsdp2", "zero1", "zero2")},
    "two_ranks": Run(("stage1.trainer.micro_batch_size=1", "stage2.trainer.micro_batch_size=1"),
                     _launched("ddp", 2), {"ICCLD_SHARED_GPU": "true"}),
}  # fmt: skip


def correctness(folder: Path) -> Iterator[tuple[str, Any]]:
    """Compare runs to the bit, and the losses of engines; `failed` says why a run ended."""
    shards, runs = make_shards(folder / "scenes"), folder / "runs"
    at_once = len(RUNS) if torch.cuda.is_available() else 2
    with ThreadPoolExecutor(at_once) as pool:
        running = {name: pool.submit(end_of, run, shards, runs / name) for name, run in RUNS.items()}
        ended = {name: future.result() for name, future in running.items()}
    failed = {name: said for name, said in ended.items() if said}
    yield "failed", failed
    for one, other in (("plain", "again"), ("deterministic", "deterministic_again")):
        if not {one, other} & failed.keys():
            yield f"{one}_as_{other}", _compare(runs / other, runs / one)
    for name in ("fsdp2", "zero1", "zero2", "two_ranks"):
        if not {name, "plain"} & failed.keys():
            apart = _apart(runs / "plain", runs / name)
            yield f"{name}_losses", {"largest_relative_difference": apart, "within": apart <= TOLERANCE}
    if "deterministic" not in failed:
        if said := _resume(runs, shards):
            yield "failed", {**failed, "resumed": said}
        else:
            yield "resumed_as_deterministic", _compare(runs / "deterministic", runs / "resumed")


def make_shards(folder: Path) -> Path:
    """Tiny rendered scenes as shards `source` and `target`."""
    _call("-m", "iccld.demo.draw", "--output", folder / "data", "--size", "64x128", "--source", 16, "--target", 16,
          "--validation", 1)  # fmt: skip
    for dataset, name, options in (
        ("gta5", "source", ()),
        ("cityscapes", "target", ("--split", "train", "--no-labels")),
    ):
        _call("-m", "iccld", "shards", "make", "--dataset", dataset, *options, "--input", folder / "data" / dataset,
              "--output", folder / name, "--workers", 1)  # fmt: skip
    return folder


def _call(*words: object) -> None:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words[:4]))}: status {done.returncode}: {done.stderr[-500:]}")


def settings_of(shards: Path, run_dir: Path) -> list[str]:
    """Both stages of a tiny model, a few steps each."""
    trainers = [
        f"stage{i}.trainer.{setting}"
        for i in (1, 2)
        for setting in (
            f"num_steps={NUM_STEPS}",
            "global_batch_size=2",
            "micro_batch_size=2",
            f"checkpoint.save_every={SAVE_EVERY}",
        )
    ]
    return [
        *("model=tiny", "dataset=scenes", "data.crop_size=[48,64]", "data.num_workers=0", "model.latent_channels=4"),
        "engine.compile=none",  # a cold compilation takes longer than all else here
        *("data.rare_class_min_pixels=20", "metrics.wandb=disabled", "metrics.log_every=1", "statistics_samples=4"),
        *(f"data.source.shards={shards}/source", f"data.target.shards={shards}/target", "data.validation.shards="),
        *(f"run_dir={run_dir}", *trainers),
    ]


def end_of(run: Run, shards: Path, run_dir: Path, *, timeout_s: float = TIMEOUT_S) -> str:
    """Train in a process of its own; the end of what it said, if it failed."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", *run.launcher, "iccld", "train", *settings_of(shards, run_dir), *run.settings]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0", **run.environment}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    log = run_dir.parent / f"{run_dir.name}.log"
    status = run_within(timeout_s, command, log=log, cwd=ROOT, environment=environment)
    if status == 0:
        return ""
    ended = f"not over within {timeout_s:g} s" if status is None else f"status {status}"
    return f"{ended}: {log.read_text(errors='replace')[-800:]}"


def _resume(runs: Path, shards: Path) -> str:
    """Go on from the first checkpoint of stage 1, as after a kill: the finished run without what came later."""
    finished, run_dir, stage = runs / "deterministic", runs / "resumed", "stage1"
    checkpoints, first = run_dir / stage / "checkpoints", f"step_{SAVE_EVERY:08d}"
    (checkpoints / first).parent.mkdir(parents=True)
    shutil.copytree(finished / stage / "checkpoints" / first, checkpoints / first)
    (checkpoints / "latest").write_text(first)
    config = (finished / "config.yaml").read_text().replace(str(finished), str(run_dir))
    (run_dir / "config.yaml").write_text(config)
    before = [
        line for line in lines(finished / "metrics.jsonl") if line["stage"] == stage and line["step"] <= SAVE_EVERY
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    return end_of(Run(DETERMINISTIC), shards, run_dir, timeout_s=RESUME_S)


def _compare(expected: Path, run_dir: Path) -> dict[str, Any]:
    others = list(differences(expected, run_dir, num_steps=NUM_STEPS))
    return {
        "same_bits": not others,
        "differences": others[:4],
        "largest_relative_difference": _apart(expected, run_dir),
    }


def _apart(expected: Path, run_dir: Path) -> float:
    """The largest relative difference of a step's loss."""
    one, other = (
        {(line["stage"], line["step"]): line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line}
        for run in (expected, run_dir)
    )
    if one.keys() != other.keys() or not one:
        raise RuntimeError(f"{run_dir} has losses of {json.dumps(sorted(map(list, other)))}")
    return max(abs(one[place] - other[place]) / abs(one[place]) for place in one)
