"""A process ends with its program's status, after what Python has to do, and not by what threads do in C++."""

import os
import socket
import subprocess
import sys
import time

import pytest

PROGRAM = """
import atexit, sys, threading, time
from iccld.runtime.ending import run_to_the_end

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
from iccld.runtime import ending

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
from iccld.runtime.ending import run_to_the_end
from iccld.runtime.engine import Engine, EngineConfig

def program():
    with Engine(EngineConfig()) as engine:
        if engine.rank == 0:
            sys.stdin.read()  # does not come to the collective
        else:
            work = torch.distributed.all_reduce(torch.ones(9), async_op=True)
            work.get_future().then(lambda future: future.value()[0].sum())
            raise ValueError("a fault")

run_to_the_end(program)
"""


@pytest.mark.distributed
def test_a_rank_that_fails_with_a_collective_under_way_ends_at_once() -> None:
    """Destroying the group would wait for the collective, and run its callback in a thread of C++."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"ACCELERATE_USE_CPU": "true", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=common | {"RANK": str(rank)},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1].stderr and any("a fault" in line for line in ranks[1].stderr)
        begin = time.monotonic()
        assert ranks[1].wait(60) == 1
        assert time.monotonic() - begin < 10
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
