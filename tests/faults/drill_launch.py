"""Launcher of two forked ranks of a kill drill: `tests.faults.drill_launch train ...`, by tests/forked.py."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from tests.distributed.launch import rank_environments

POINTS = Path(__file__).parents[2] / "tools/scripts/kill_points/sitecustomize.py"
PATIENCE_S = 30.0


def become_rank(environment: dict[str, str]) -> NoReturn:
    os.environ.update(environment)
    runpy.run_path(str(POINTS))
    runpy.run_module("iccld", run_name="__main__", alter_sys=True)
    raise SystemExit


def launch() -> int:
    """Start the ranks; when one of them fails, end the other as accelerate's launcher does."""
    os.setsid()
    living = {os.fork() or become_rank(environment) for environment in rank_environments(2, "ddp")}
    first, limit = 0, float("inf")  # status of the rank that failed first
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        living.discard(pid)
        if pid and status and not first:
            first, limit = abs(os.waitstatus_to_exitcode(status)), time.monotonic() + PATIENCE_S
            end(living, signal.SIGTERM)
        if time.monotonic() > limit:
            end(living, signal.SIGKILL)
        time.sleep(0.0 if pid else 0.02)
    return first


def end(ranks: set[int], number: signal.Signals) -> None:
    for rank in ranks:
        os.kill(rank, number)


if __name__ == "__main__":
    sys.exit(launch())
