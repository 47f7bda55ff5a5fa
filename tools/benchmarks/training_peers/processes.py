"""Part 3 of bench_train.py: weak scaling over real ranks, and the wait for data of a real run.

A rank is this file as a script: it builds a stage, then trains for some steps whenever it is told to, and says how long
they took. So one process, two ranks and two processes that know nothing of each other can take turns. The last are the
upper bound: they share the machine's memory and clock, as two ranks do, but exchange nothing. All time is wall time.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from training_peers.sizes import SIZES, STAGES, Ours, Size, config_of, make_stage, random_batch
from training_peers.turns import NUM_WARMUP, spread

from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure.peaks import wait_for
from iccld.runtime.settings import EngineConfig

# Freed memory is kept, as on a GPU. By default glibc gives back what lies at its end, and the page faults when it is
# taken again were 8 to 17 % of a step, more or less by luck: quartiles of a process were close, processes differed.
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_MMAP_THRESHOLD_": str(10**11)}
ROOT = Path(__file__).resolve().parents[3]
NUM_RANKS = 2
TURN_TIMEOUT_S = 300.0
SCALING_ROUNDS = 6
TURN_STEPS = 2
LOG_EVERY = 4
LOGGED_WARMUP = 2  # lines: the loader's workers start, and its queue fills


def train_when_told(name: str, size: Size) -> None:
    """A rank: for each line on stdin, train for a turn and answer with the seconds of its steps."""
    torch.set_num_threads(1)
    size = replace(size, batch_size=size.ranks_batch_size)
    with Engine(EngineConfig()) as engine:
        batch = random_batch(size, first=engine.ranks.rank * size.batch_size)
        ours = Ours(make_stage(name, config_of(size), engine.device), engine, batch)
        for _ in range(NUM_WARMUP):
            ours()
        wait_for(engine.device)
        print("ready", flush=True)
        for _ in sys.stdin:
            seconds = []
            for _ in range(TURN_STEPS):
                started = time.perf_counter()
                ours()
                wait_for(engine.device)
                seconds.append(time.perf_counter() - started)
            print(json.dumps(seconds), flush=True)


class Processes:
    """Ranks of one group, or processes of their own."""

    def __init__(self, name: str, size_name: str, *, count: int, together: bool, on_gpus: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(count):
            own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tools' / 'benchmarks'}"}
            environment = os.environ | KEPT_MEMORY | own
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))} if on_gpus else HIDDEN_GPUS
            if together:
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            elif on_gpus:
                environment["CUDA_VISIBLE_DEVICES"] = str(rank)
            command = [sys.executable, __file__, name, size_name]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(command, env=environment, **pipes))

    def answers(self) -> list[str]:
        """A line of each. Raises ValueError if one ends or is silent for too long."""
        timer = threading.Timer(TURN_TIMEOUT_S, self.kill)
        timer.start()
        lines = [str(process.stdout and process.stdout.readline()).strip() for process in self.processes]
        timer.cancel()
        if not all(lines):
            raise ValueError("a rank of the scaling part ended or hung; what it said stands above.")
        return lines

    def turn(self) -> list[list[float]]:
        """The seconds of each one's steps."""
        for process in self.processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(line) for line in self.answers()]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


HIDDEN_GPUS = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


@contextmanager
def started(name: str, size_name: str, *, count: int, together: bool, on_gpus: bool) -> Iterator[Processes]:
    processes = Processes(name, size_name, count=count, together=together, on_gpus=on_gpus)
    try:
        assert set(processes.answers()) == {"ready"}
        yield processes
    finally:
        processes.kill()


def weak_scaling(name: str, size_name: str) -> dict[str, Any]:
    """The rate of two ranks over twice that of one, and over that of two independent processes, at one batch a rank.

    On a machine with GPUs, on two of them; else on the CPU, a thread each.
    """
    on_gpus = torch.cuda.is_available()
    if on_gpus and torch.cuda.device_count() < NUM_RANKS:
        return {"skipped": f"scaling needs {NUM_RANKS} GPUs, and there is {torch.cuda.device_count()}"}
    with ExitStack() as stack:
        groups = {
            group: stack.enter_context(started(name, size_name, count=count, together=together, on_gpus=on_gpus))
            for group, count, together in (
                ("one", 1, False),
                ("two", NUM_RANKS, True),
                ("independent", NUM_RANKS, False),
            )
        }
        turns: dict[str, list[list[list[float]]]] = {group: [] for group in groups}
        for number in range(SCALING_ROUNDS if size_name != "toy" else 2):
            for group in list(groups) if number % 2 == 0 else list(reversed(groups)):
                turns[group].append(groups[group].turn())
    means = {group: [statistics.fmean(map(statistics.fmean, turn)) for turn in own] for group, own in turns.items()}
    fastest = {
        group: min(max(step) for turn in own for step in zip(*turn, strict=True)) for group, own in turns.items()
    }
    return {
        **spread(_ratios(means, "one", "two")),
        "of_fastest_steps": fastest["one"] / fastest["two"],
        "over_independent": spread(_ratios(means, "independent", "two")),
        "independent": spread(_ratios(means, "one", "independent")),
        "step_s": {group: statistics.median(own) for group, own in means.items()},
        "fastest_step_s": fastest,
        "device": "cuda" if on_gpus else "cpu, a thread each",
        "batch_size": SIZES[size_name].ranks_batch_size,
    }


def _ratios(seconds: dict[str, list[float]], bound: str, group: str) -> list[float]:
    """Return the ratios; at one batch a process, rates go as seconds a step."""
    return [one / other for one, other in zip(seconds[bound], seconds[group], strict=True)]


def in_own_process(num_threads: int, function: Callable[..., dict[str, Any]], *given: Any, **options: Any) -> Any:
    """The function's result, of a process that begins with no memory of the comparison before it.

    `num_threads`: torch's there; 0 leaves them. Raises ValueError if the process is killed.
    """
    before = os.environ.copy()
    os.environ.update(KEPT_MEMORY)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (num_threads,)) as pool:
            return pool.submit(function, *given, **options).result()
    except BrokenProcessPool:
        raise ValueError(f"the process of {function.__name__} was killed; does memory suffice?") from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin(num_threads: int) -> None:
    if num_threads:
        torch.set_num_threads(num_threads)


def data_wait(size: Size) -> dict[str, Any]:
    """Share of the step's time that a real run of both stages waits for its batches, by stage, after the warm-up."""
    with tempfile.TemporaryDirectory(prefix="bench_train-") as folder:
        _run("-m", "iccld.demo.draw", "--output", f"{folder}/data", *_scenes(size))
        for dataset, name, split in (("gta5", "source", ()), ("cityscapes", "target", ("--split", "train"))):
            given = ["--dataset", dataset, "--input", f"{folder}/data/{dataset}", *split]
            _run("-m", "iccld", "shards", "make", *given, "--output", f"{folder}/{name}")
        _run("-m", "iccld", "launch", "1", "train", *_overrides(size, folder))
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {}
    for name in STAGES:
        own = [line for line in lines if line["stage"] == name and "data_wait" in line][LOGGED_WARMUP:]
        total = sum(line["step_s"] for line in own)
        found[name] = {
            "data_wait": sum(line["step_s"] * line["data_wait"] for line in own) / total,
            "step_s": total / len(own),
        }
    return {"ratio": max(own["data_wait"] for own in found.values()), **found}


def _scenes(size: Size) -> list[str]:
    count = str(size.scenes)
    return ["--source", count, "--target", count, "--validation", "1", "--size", f"{size.crop}x{2 * size.crop}"]


def _overrides(size: Size, folder: str) -> list[str]:
    batch = size.batch_size
    trainers = [f"stage{i}.trainer.{key}" for i in (1, 2) for key in _trainer(size.steps, batch)]
    return [
        *(*size.model, "stage2=paper"),
        *("dataset=scenes", f"run_dir={folder}/run", f"data.source.shards={folder}/source", "preflight=false"),
        *(
            f"data.target.shards={folder}/target",
            "data.validation.shards=",
            f"data.crop_size=[{size.crop},{size.crop}]",
        ),
        *("metrics.wandb=disabled", f"metrics.log_every={LOG_EVERY}", "statistics_samples=4", *trainers),
    ]


def _trainer(steps: int, batch: int) -> list[str]:
    return [f"num_steps={steps}", f"global_batch_size={batch}", f"micro_batch_size={batch}"]


def _run(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(arguments[:3])} ended with status {done.returncode}: {done.stderr[-2000:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A rank of bench_train.py's scaling part.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("size", choices=SIZES)
    chosen = parser.parse_args()
    train_when_told(chosen.stage, SIZES[chosen.size])
