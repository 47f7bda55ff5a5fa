"""Kills training runs of two ranks by SIGKILL, many times, and compares what they end with to an undisturbed run.

    python tools/scripts/kill_drill.py --kills 200 --json kills.json

A tiny run of both stages is started by the launcher, killed, and started again by the same command until it is through;
then the next run, until there were enough kills. Some kills come at random moments, others at chosen ones: inside a
save, before its rename, between rename and `latest`, inside retention, and in the hand-off from stage 1 to stage 2.
One rank is killed, or the launcher and every rank. Compared bit by bit are the finished models, the last checkpoints
and the losses of every step; a sample is lost where a step is missing in metrics.jsonl, repeated where one is there
twice.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from compare_runs import STAGES, differences, lines

from iccld.data.shards.making import MakeShardsConfig, make_shards
from iccld.demo.scenes import write_cityscapes, write_gta5

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS, BATCH = 8, 4
LIMIT_S = 300.0

POINTS = {
    "save": ("open", r"/step_\d+\.tmp/", 4),
    "rename": ("os.rename", r"/checkpoints/step_\d{8}$", 1),
    "latest": ("os.rename", r"/checkpoints/latest$", 1),
    "retention": ("os.remove", r"/checkpoints/step_\d{8}/", 2),
    "export": ("open", r"/stage1/final\.tmp/", 3),
    "hand_off": ("os.rename", r"/stage1/final$", 1),
    "stage2": ("os.mkdir", r"/stage2/", 1),
}
"""Kind of kill: the audit event and path that it comes just before, and at which occurrence at the latest."""

KINDS = [*POINTS, "random_rank", "random_launch"]  # the points in the order in which a run passes them
PATIENCE = 5  # attempts in which a kind may fail to come


class Launch(Protocol):
    """Started launcher of the ranks, as `subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


@dataclass
class Drill:
    """Drill in a folder, with its counts."""

    folder: Path
    engine: str
    draw: random.Random
    kinds: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    samples_lost: int = 0
    samples_repeated: int = 0
    differences: list[str] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    upcoming: list[str] = field(default_factory=lambda: list(KINDS))
    start_s: float = 0.0  # of the undisturbed run: until the first step, and from there to the end
    work_s: float = 0.0

    def attempt(self, run_dir: Path, kind: str = "") -> bool:
        """Start the command on `run_dir`, killing it by `kind`; whether it came to its end."""
        log = self.folder / "killed"
        log.unlink(missing_ok=True)
        scraps = self.folder / "scraps"  # what a killed launcher leaves
        scraps.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(scraps)}
        environment["KILL_DRILL_LOG"] = str(log)
        if kind in POINTS:
            event, pattern, last = POINTS[kind]
            who = self.draw.choice(("rank", "launch"))
            environment["KILL_DRILL_POINT"] = f"{kind} {event} {pattern} {self.draw.randint(1, last)} {who}"
            paths = [str(ROOT / "tools" / "scripts" / "kill_points"), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        started = _num_started(run_dir)
        launch = self.start(["train", *_overrides(self.folder, run_dir)], environment)
        try:
            if kind.startswith("random"):
                self._kill_at_random(launch, kind, log, until=lambda: _num_started(run_dir) > started)
            status = launch.wait(LIMIT_S)
        finally:
            for process in self.processes():  # ranks outlive a launcher that was killed
                process.kill()
            launch.wait()
        killed = log.read_text().split() if log.exists() else []
        self.kinds.update(killed[:1])
        if status and not killed:
            tail = (self.folder / "output").read_text()[-3000:]
            raise RuntimeError(f"the run failed without having been killed, with exit status {status}:\n{tail}")
        return not killed

    def start(self, verb: list[str], environment: dict[str, str]) -> Launch:
        """Start the launcher with two ranks; what they say is in the file `output`."""
        engine = [] if self.engine == "ddp" else ["--engine", self.engine]
        command = [sys.executable, "-m", "iccld", "launch", "2", *engine, *verb]
        with (self.folder / "output").open("w") as output:
            return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def processes(self) -> list[psutil.Process]:
        """Return the living processes of the attempt: what was started with its log in the environment."""
        found, log = [], str(self.folder / "killed")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("KILL_DRILL_LOG") == log and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Return those of the processes that are ranks."""
        return [process for process in self.processes() if "RANK" in process.environ()]

    def _kill_at_random(self, launch: Launch, kind: str, log: Path, until: Callable[[], bool]) -> None:
        """Kill at any moment of the attempt; most moments are after it has loaded and begun to train."""
        if self.draw.random() < 0.15:
            delay = self.draw.uniform(0, self.start_s)
        else:
            delay = self.draw.uniform(0, 0.6 * self.work_s)
            while launch.poll() is None and not until():
                time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launch.wait(delay)
        ranks = self.ranks()
        if launch.poll() is not None or not ranks:
            return
        log.write_text(f"{kind}\n")
        victims = [self.draw.choice(ranks)] if kind == "random_rank" else [psutil.Process(launch.pid), *ranks]
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def undisturbed(self) -> Path:
        """The run that the others are compared with."""
        run_dir, start = self.folder / "undisturbed", time.time()
        assert self.attempt(run_dir)
        events = lines(run_dir / "events.jsonl")
        begin = next(event["time"] for event in events if event["event"] == "started")
        self.start_s, self.work_s = begin - start, events[-1]["time"] - begin
        return run_dir

    def run(self, expected: Path, kills: int) -> None:
        """One run to its end through kills, at most until there were `kills` in all; then the comparison."""
        self.runs += 1
        run_dir = self.folder / f"run_{self.runs:03d}"
        finished = False
        while not finished:
            kind = self._next() if self.kinds.total() < kills else ""
            finished = self.attempt(run_dir, kind)
            if finished and kind:  # the run was past that point; the next one begins with it
                self._put_back(kind)
        found = [f"{run_dir}: {what}" for what in differences(expected, run_dir, num_steps=NUM_STEPS)]
        steps = [line for line in lines(run_dir / "metrics.jsonl") if "loss" in line]
        counts = Counter((line["stage"], line["step"]) for line in steps)
        self.samples_lost += BATCH * sum(not counts[s, n] for s in STAGES for n in range(1, NUM_STEPS + 1))
        self.samples_repeated += BATCH * sum(count - 1 for count in counts.values())
        self.differences += found
        if not found:
            shutil.rmtree(run_dir)

    def figures(self) -> dict[str, Any]:
        return {
            "kills": self.kinds.total(),
            "runs": self.runs,
            "bit_identical": not self.differences,
            "samples_lost": self.samples_lost,
            "samples_repeated": self.samples_repeated,
            "kinds": {kind: self.kinds[kind] for kind in KINDS},
        }

    def _next(self) -> str:
        if not self.upcoming:
            self.upcoming = self.draw.sample(KINDS, len(KINDS))
        return self.upcoming.pop(0)

    def _put_back(self, kind: str) -> None:
        self.upcoming.insert(0, kind)
        self.missed[kind] += 1
        if self.missed[kind] > PATIENCE + self.kinds[kind]:
            raise RuntimeError(f"no kill of kind {kind!r} came in {self.missed[kind]} attempts; see POINTS.")


def _num_started(run_dir: Path) -> int:
    path = run_dir / "events.jsonl"
    return path.read_text().count('"started"') if path.exists() else 0


def _make_shards(folder: Path) -> None:
    write_gta5(folder / "gta5", count=16, seed=0, height=64, width=128)
    write_cityscapes(folder / "cityscapes", train=16, val=1, seed=0, height=64, width=128)
    for name, dataset, split in (("source", "gta5", ""), ("target", "cityscapes", "train")):
        make_shards(
            MakeShardsConfig(
                dataset=dataset,
                input=str(folder / dataset),
                output=str(folder / name),
                split=split,
                no_labels=name == "target",
                samples_per_shard=6,
            )
        )


def _overrides(folder: Path, run_dir: Path) -> list[str]:
    lengths = (f"num_steps={NUM_STEPS}", f"global_batch_size={BATCH}", "micro_batch_size=1", "checkpoint.save_every=2")
    return [
        *("model=tiny", "model.latent_channels=4", "model.denoiser.width=16", "model.discriminator.width=8"),
        *("dataset=scenes", f"data.source.shards={folder}/source", f"data.target.shards={folder}/target"),
        *("data.validation.shards=", "data.crop_size=[48,64]", "data.num_workers=0", "data.rare_class_min_pixels=20"),
        *(f"stage{i}.trainer.{length}" for i in (1, 2) for length in (*lengths, "schedule.warmup_steps=2")),
        # A rank whose peer was killed is certain of it after a few beats.
        *("metrics.wandb=disabled", "metrics.log_every=1", "statistics_samples=4", "watchdog.beat_s=0.5"),
        *("stage1.objective.confidence_threshold=0.06", f"run_dir={run_dir}"),
    ]


def main() -> int:
    """Run the drill; exit status 1 where a killed run ended otherwise than the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["ddp", "zero1", "zero2", "fsdp2"], default="ddp")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error(f"--kills {arguments.kills} must be at least 1.")
    begin, draw = time.monotonic(), random.Random(arguments.seed)
    drill = Drill(Path(tempfile.mkdtemp(prefix="kill_drill_")), arguments.engine, draw)
    _make_shards(drill.folder)
    expected, figures = drill.undisturbed(), drill.figures()
    while drill.kinds.total() < arguments.kills:
        drill.run(expected, arguments.kills)
        verdict = "; ".join(drill.differences) or "all runs equal the undisturbed one"
        print(f"run {drill.runs}: {drill.kinds.total()} kills in all; {verdict}", flush=True)
        figures = drill.figures() | {"seconds": round(time.monotonic() - begin, 1)}
        if arguments.json:  # after every run: a drill of hours may be interrupted too
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    if not drill.differences:
        shutil.rmtree(drill.folder)
    return int(bool(drill.differences))


if __name__ == "__main__":
    sys.exit(main())
