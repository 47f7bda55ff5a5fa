"""A process ends with its program's status, after what Python has to do, and not by what threads do in C++."""

import os
import socket
import subprocess
import sys
import time

import pytest

from iccld.runtime.measure.telemetry import CALL_S
from iccld.runtime.ranks import COLLECTIVE_TIMEOUT

PROGRAM = """
import atexit, sys, threading, time
from iccld.runtime.faults.ending import run_to_the_end

class Part:
    def __del__(self):
        print("taken down")

part = Part()
atexit.register(print, "at exit")

def program():
    threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
    {end}

run_to_the_end(program)
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("return 0", 0, ""),
        ("return None", 0, ""),
        ("return 85", 85, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no such file')", 1, "no such file\n"),
        ("raise RuntimeError('a fault')", 1, "RuntimeError: a fault\n"),
    ],
)
def test_the_status_is_that_of_the_program_once_python_is_done(end: str, status: int, said: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(end=end)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status
    assert done.stdout == "thread\nat exit\n"
    assert done.stderr.endswith(said) and bool(done.stderr) == bool(said)


SLOW_SAVE = """
import time
from concurrent.futures import ThreadPoolExecutor
from iccld.runtime.faults import ending

def program():
    ending.await_at_the_end(ThreadPoolExecutor(1).submit(lambda: (time.sleep(2), print("saved", flush=True))))
    raise RuntimeError("a fault")

ending.END_S = 0.2
ending.run_to_the_end(program)
"""


def test_a_save_under_way_is_waited_for_beyond_the_limit_of_the_rest() -> None:
    command = [sys.executable, "-c", SLOW_SAVE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "saved\n")


RANK = """
import sys, torch
from iccld.runtime.faults.ending import run_to_the_end
from iccld.runtime.engine.engine import Engine, EngineConfig

def program():
    with Engine(EngineConfig()) as engine:
        if engine.ranks.rank == 0:
            sys.stdin.read()  # does not come to the collective
        else:
            work = torch.distributed.all_reduce(torch.ones(9), async_op=True)
            work.get_future().then(lambda future: future.value()[0].sum())
            raise ValueError("a fault")

run_to_the_end(program)
"""


def start_ranks(program: str) -> list[subprocess.Popen[str]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"ACCELERATE_USE_CPU": "true", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=common | {"RANK": str(rank)}, stdin=pipe, stdout=pipe, stderr=pipe, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.distributed
def test_a_rank_that_fails_with_a_collective_under_way_ends_at_once() -> None:
    """Destroying the group would wait for the collective, and run its callback in a thread of C++."""
    ranks = start_ranks(RANK)
    try:
        assert ranks[1].stderr and any("a fault" in line for line in ranks[1].stderr)
        begin = time.monotonic()
        assert ranks[1].wait(60) == 1
        assert time.monotonic() - begin < 10
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


LEAVING = """
import torch
from iccld.runtime.ranks import groups
from iccld.runtime.engine.engine import Engine, EngineConfig

with Engine(EngineConfig()) as engine:
    pass
of_host = groups().index(engine.ranks.host_group)
limits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups()]
print(limits.pop(of_host), *limits)
"""


@pytest.mark.distributed
def test_a_rank_that_leaves_waits_on_the_host_alone_and_longer_than_telemetry_may_take() -> None:
    ranks = start_ranks(LEAVING)
    try:
        for rank in ranks:
            of_host, *others = map(float, rank.communicate(timeout=120)[0].split())
            assert of_host >= 3 * CALL_S and set(others) == {COLLECTIVE_TIMEOUT.total_seconds()}
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
