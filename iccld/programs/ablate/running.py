"""Training of what is left of a grid: a process a run, several at a time; one that fails does not stop the others.

A run whose process outlived an earlier command goes on, and is waited for: its lock shows that it lives.
"""

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from iccld.data.processes import usable_cpus
from iccld.durable import make_folder, open_to_append
from iccld.outcome import status_of, words
from iccld.programs.ablate.rows import LOG_NAME, Ablation, has_finished, is_whole, prepare, refuse_changes
from iccld.programs.ablate.tasks import State, Task, blocked_tasks, devices_of, next_task, tasks_of
from iccld.programs.run.child import POLL_S, how_it_failed, signals_noted, status_of_all
from iccld.reading import read_bytes
from iccld.runtime.faults.lock import locked

BUSY_S = 5.0  # between two looks at a run that another process trains
TAIL_BYTES, TAIL_LINES = 1 << 14, 15
STOPPED_FROM_OUTSIDE = "was stopped from outside before it was finished; the same command goes on"


@dataclass
class Ending:
    """Outcome of the tasks. `failures`: their exit statuses; `signal`: the one that stopped the command, or 0."""

    states: dict[Task, State]
    failures: dict[Task, int] = field(default_factory=dict)
    signal: int = 0

    @property
    def status(self) -> int:
        """Return the exit status of the command."""
        return 128 + self.signal if self.signal else status_of_all(self.failures.values())


@dataclass
class _Process:
    slot: int
    process: "subprocess.Popen[bytes]"
    began: float


def states_of(ablation: Ablation) -> dict[Task, State]:
    """Return the state of each task. Raises ValueError if the grid has changed for one that must not change."""
    needs = tasks_of(ablation.grid)
    for task in needs:
        refuse_changes(ablation, task)
    return {task: State.finished if is_whole(ablation, task) else State.waiting for task in needs}


def train_rows(ablation: Ablation, *, num_processes: int) -> Ending:
    """Train until nothing is left that can be; print what begins, ends and fails."""
    trainings = Trainings(ablation, num_processes=num_processes)
    with signals_noted() as came, trainings:
        while not came:
            trainings.collect()
            trainings.begin()
            if trainings.is_over:
                break
            time.sleep(POLL_S)
        if came:
            trainings.stop(came)
            trainings.ending.signal = came[0]
    return trainings.ending


class Trainings:
    """Processes that train, and the states of all tasks. An error within its block lets the processes save and end."""

    def __init__(self, ablation: Ablation, *, num_processes: int) -> None:
        self.ablation, self.num_processes = ablation, num_processes
        self.needs = tasks_of(ablation.grid)
        self.ending = Ending(states_of(ablation))
        self._running: dict[Task, _Process] = {}
        self._busy: dict[Task, float] = {}  # trained by another process; when to look again
        self._waited_for: set[Task] = set()
        self._devices = _visible_devices()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running.values():
            running.process.terminate()
        for running in self._running.values():
            running.process.wait()

    @property
    def is_over(self) -> bool:
        return not self._running and not self._busy

    def begin(self) -> None:
        """Fill the free slots."""
        now = time.monotonic()
        self._busy = {task: until for task, until in self._busy.items() if until > now}
        while len(self._running) < self.num_processes:
            task = next_task(self.needs, self.ending.states, busy=self._busy)
            if task is None:
                break
            self._begin(task)
        for task in blocked_tasks(self.needs, self.ending.states):
            needed = self.needs[task]
            assert needed is not None, "a blocked task waits for another"
            self._fail(task, self.ending.failures[needed], why=f"not begun, since {needed} is not finished")

    def _begin(self, task: Task) -> None:
        run_dir = self.ablation.run_dir(task)
        try:
            with locked(make_folder(run_dir, within=self.ablation.folder)) as holder:
                pass
            if holder:
                if task not in self._waited_for:
                    print(f"{task}: is trained by {holder}, from an earlier command; waiting for it", flush=True)
                self._waited_for.add(task)
                self._busy[task] = time.monotonic() + BUSY_S
            elif has_finished(self.ablation, task):
                self._finish(task, "finished")
            else:
                prepare(self.ablation, task)
                self._start(task)
        except (ValueError, OSError) as error:
            self._fail(task, status_of(error), why=f"cannot begin: {words(error)}")

    def _start(self, task: Task) -> None:
        slot = min(set(range(self.num_processes)) - {each.slot for each in self._running.values()})
        with open_to_append(self.ablation.run_dir(task) / LOG_NAME) as log:
            process = subprocess.Popen(
                self.ablation.process_words(task),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
            )
        self._running[task] = _Process(slot, process, time.monotonic())
        self.ending.states[task] = State.running
        print(f"{self._count()} {task}: begins, process {process.pid}", flush=True)

    def _environment(self, slot: int) -> dict[str, str]:
        num_ranks = self.ablation.num_ranks
        threads = max(1, usable_cpus() // (self.num_processes * num_ranks))
        own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}
        if devices := devices_of(slot, num_ranks=num_ranks, devices=self._devices):
            own["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        return {**os.environ, **own}

    def collect(self) -> None:
        """Take note of the processes that have ended."""
        for task, running in list(self._running.items()):
            if (status := running.process.poll()) is None:
                continue
            del self._running[task]
            if status == self.ablation.configs[task.name].preemption.exit_status:
                status = 0  # as the settings call a run that was stopped, and has saved
            minutes = (time.monotonic() - running.began) / 60
            try:
                ended = status == 0 and has_finished(self.ablation, task)
            except (ValueError, OSError) as error:
                self._fail(task, status_of(error), why=f"is not finished: {words(error)}")
                continue
            if ended:
                self._finish(task, f"finished, {minutes:.1f} min")
            else:
                why = how_it_failed(status) if status else STOPPED_FROM_OUTSIDE
                self._fail(task, status, why=why, log=self.ablation.run_dir(task) / LOG_NAME)

    def _finish(self, task: Task, words: str) -> None:
        self.ending.states[task] = State.finished
        print(f"{self._count()} {task}: {words}", flush=True)

    def _fail(self, task: Task, status: int, *, why: str, log: Path | None = None) -> None:
        self.ending.states[task] = State.failed
        self.ending.failures[task] = status
        print(f"{self._count()} {task}: {why}", flush=True)
        if log is not None and log.is_file():
            print(f"  the end of {log}:", *(f"    {line}" for line in tail(log)), sep="\n", flush=True)

    def _count(self) -> str:
        done = sum(state in (State.finished, State.failed) for state in self.ending.states.values())
        return f"[{done}/{len(self.ending.states)}]"

    def stop(self, came: list[int]) -> None:
        """Let all processes save and end; a further signal is passed on, which ends them at once."""
        print(f"{signal.Signals(came[0]).name}: runs save and end ({len(self._running)})", flush=True)
        passed_on = 0
        while self._running:
            if passed_on < len(came):
                passed_on = len(came)
                for running in self._running.values():
                    running.process.terminate()
            for task, running in list(self._running.items()):
                if running.process.poll() is not None:
                    del self._running[task]
                    ended = is_whole(self.ablation, task)
                    self.ending.states[task] = State.finished if ended else State.waiting
                    print(f"{task}: {'finished' if ended else 'stopped'}", flush=True)
            time.sleep(POLL_S)


def tail(path: Path) -> list[str]:
    """Return the last lines of a log, without what a terminal would take for a command."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = read_bytes(file, TAIL_BYTES).decode(errors="replace")
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in text.splitlines() if line.strip()]
    return lines[-TAIL_LINES:]


def _visible_devices() -> list[str]:
    """Return the GPUs that the processes may share, by the names that CUDA takes."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
