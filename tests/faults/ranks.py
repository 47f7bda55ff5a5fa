"""Ranks as a scheduler starts them: plain processes, each with its place in the environment, and no agent over them."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.forked import Forked

ROOT = Path(__file__).parents[2]


class Ranks:
    """`iccld train`, or another verb, on nodes n0, n1, ..., one rank each; `fault` is done to it (worker.py).

    `forked`: see tests/forked.py.
    """

    def __init__(
        self,
        overrides: list[str],
        folder: Path,
        *,
        num_ranks: int = 2,
        fault: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        verb: str = "train",
        forked: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"log_{rank}" for rank in range(num_ranks)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        # A test in this process may have left wandb's service behind, which the ranks would join.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        common = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
        common |= {"FAULT": json.dumps(fault or {}), "LOCAL_RANK": "0", "PYTHONUNBUFFERED": "1"}
        common |= {"PYTHONFAULTHANDLER": "1", **(environment or {})}
        start = Forked if forked else started
        self.processes = [
            start(
                "tests.faults.worker",
                [verb, *overrides],
                environment=common | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"},
                log=log,
            )
            for rank, log in enumerate(self.logs)
        ]

    def log(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def until(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        limit = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > limit or all(process.poll() is not None for process in self.processes):
                raise AssertionError(self._what_they_do())
            time.sleep(0.02)

    def until_said(self, words: str, timeout_s: float = 240) -> None:
        self.until(lambda: words in self.log(), timeout_s)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].send_signal(number)

    def wait(self, timeout_s: float = 240) -> list[int]:
        """The ranks' exit statuses."""
        limit = time.monotonic() + timeout_s
        try:
            return [process.wait(max(limit - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self._what_they_do()) from None

    def _what_they_do(self) -> str:
        """Their statuses, their logs, and the stacks of those that live and of their loader workers."""
        statuses = [process.poll() for process in self.processes]
        living = [psutil.Process(process.pid) for process in self.processes if process.poll() is None]
        workers = [child for rank in living for child in rank.children(recursive=True)]
        for process in [*living, *workers]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
                process.send_signal(signal.SIGABRT)  # faulthandler writes the stacks
        psutil.wait_procs(living, timeout=10)
        return "\n".join([f"statuses {statuses}", *(log.read_text()[-10000:] for log in self.logs)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def started(module: str, arguments: list[str], *, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process as `Forked` does, in a Python of its own."""
    command = [sys.executable, "-m", module, *arguments]
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
