"""A command with a limit, after which nothing that it started still runs and uses the device.

Ranks and loader workers may have sessions of their own, and outlive the process that started them, so they are known by
a mark in their environment.
"""

import contextlib
import os
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

MARK = "ICCLD_GPU_PART"
NUM_TRIES = 10  # a second each: a process ends when its call into the driver does
HUNG_S = 1.0  # then it is left behind


def run_within(
    limit_s: float, command: Sequence[str], *, log: Path, cwd: Path, environment: Mapping[str, str] | None = None
) -> int | None:
    """Run a command; return its status, or None at the limit. Its output goes to the end of `log`."""
    mark = new_mark()
    marked = {**os.environ, **(environment or {}), MARK: mark}
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=cwd, env=marked, stdout=file, stderr=file)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_marked(mark)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(HUNG_S)


def new_mark() -> str:
    """Make a mark that begins with the one of this process, if it has one."""
    return f"{os.environ.get(MARK, '')}/{uuid.uuid4().hex}"


def end_marked(mark: str) -> None:
    """Kill each process whose mark begins with this one, and what these start meanwhile."""
    for _ in range(NUM_TRIES):
        found = [process for process in psutil.process_iter() if _mark_of(process).startswith(mark)]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def _mark_of(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except (psutil.Error, OSError):  # it has ended, or belongs to another user
        return ""
