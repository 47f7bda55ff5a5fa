import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from iccld.data.processes import Progress, Stopped, in_processes, stoppable

SLEEPERS = """
import os, sys, time
from iccld.data.processes import in_processes
from tests.data.test_processes import announce_and_sleep
if __name__ == "__main__":
    with in_processes(announce_and_sleep, 2) as map_:
        list(map_(range(4)))
"""


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def announce_and_sleep(number: int) -> None:
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(60)


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> None:
    raise OSError(number, "no")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_all_tasks_are_done_once(num_workers: int) -> None:
    with in_processes(square, num_workers) as map_:
        results = list(map_(range(20)))
    assert sorted(square for square, _ in results) == [n * n for n in range(20)]
    pids = {pid for _, pid in results}
    assert (pids == {os.getpid()}) if num_workers == 1 else os.getpid() not in pids


def test_tasks_are_taken_as_workers_become_free() -> None:
    taken: list[int] = []
    with in_processes(square, 2) as map_:
        results = map_(taken.append(n) or n for n in range(100))  # type: ignore[func-returns-value]
        next(results)
        assert len(taken) <= 2 * 2 + 1


def test_errors_of_workers_come_through() -> None:
    with pytest.raises(OSError, match="no"), in_processes(fail, 2) as map_:
        list(map_(range(3)))
    with (
        pytest.raises(ValueError, match="a worker process was killed, perhaps for want of memory; use fewer --workers"),
        in_processes(die, 2) as map_,
    ):
        list(map_(range(3)))
    with pytest.raises(ValueError, match="--workers 0 must be at least 1"), in_processes(square, 0):
        pass


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    assert all(map(is_running, pids))
    process.send_signal(number)
    process.wait(timeout=10)
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, pids))


def test_leaving_the_block_ends_workers_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="enough"), in_processes(time.sleep, 2) as map_:
        next(map_([0.0, 60.0, 60.0, 60.0]))
        raise RuntimeError("enough")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_block(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped, stoppable():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert stopped.value.signal == number and signal.getsignal(number) == before


def test_rate_and_time_left() -> None:
    now = [100.0]
    progress = Progress(10_000, clock=lambda: now[0])
    now[0] += 2
    assert progress.advance(2000) == "1,000 samples/s, 0:08 left"
    now[0] += 1000
    assert progress.advance(0) == "2 samples/s, 1:06:48 left"
    now[0] = 200.0
    assert progress.advance(8000) == "100 samples/s, 0:00 left"
    assert Progress(0).advance(0) == "0 samples/s, 0:00 left"
    megabytes = Progress(10**9, unit="MB", scale=10**6, clock=partial(next, iter([0.0, 2.0])))
    assert megabytes.advance(10**8) == "50 MB/s, 0:18 left"
