"""One request, a second one, a deadline; and that children of the process have no part in it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from iccld.outcome import FORCED
from iccld.runtime.faults.preemption import SIGNALS, Preemption
from iccld.runtime.settings import PreemptionConfig

ROOT = Path(__file__).parents[3]

HEAD = """
import os, signal, sys, threading, time
from iccld.runtime.faults.preemption import SIGNALS, Preemption
from iccld.runtime.settings import PreemptionConfig

def asked(preemption):
    limit = time.monotonic() + 20
    while not preemption.came:
        assert time.monotonic() < limit
        time.sleep(0.01)
"""


def start(code: str) -> subprocess.Popen[str]:
    """A process with this code; it has said "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"RANK": "3", "SLURMD_NODENAME": "node7"},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_request_that_came_while_signals_were_held_back_is_heard() -> None:
    """A rank holds signals back while it starts."""
    process = start("""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGUSR1)
    print("ready", flush=True)
    with Preemption() as preemption:
        asked(preemption)
    """)
    assert process.wait(20) == 0


HUNG = """
    with Preemption(PreemptionConfig(grace_s={grace_s}, debounce_s={debounce_s})):
        print("ready", flush=True)
        {hang}
"""
IN_PYTHON = "threading.Event().wait(60)"
ON_A_LOCK = "lock = threading.Lock(); lock.acquire(); lock.acquire()"
IN_C = "import ctypes; code = ctypes.CDLL(None); code.pause() + code.pause() + code.pause()"


@pytest.mark.parametrize(
    ("hang", "grace_s"),
    [(IN_PYTHON, "0"), (ON_A_LOCK, "0"), (IN_C, "0"), (IN_PYTHON, "float('inf')"), (IN_PYTHON, "1e12")],
)
def test_a_second_request_ends_the_process_though_its_main_thread_hangs(hang: str, grace_s: str) -> None:
    process = start(HUNG.format(grace_s=grace_s, debounce_s=0.5, hang=hang))
    process.send_signal(signal.SIGUSR1)
    time.sleep(2)  # far above `debounce_s`, also on a busy machine
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=10)
    assert process.returncode == FORCED
    assert error.startswith("rank 3 on node7 ends at once: SIGTERM came")


def test_one_request_that_is_delivered_several_times_is_one() -> None:
    process = start(
        """
        with Preemption(PreemptionConfig(grace_s=0, debounce_s=2.0)) as preemption:
            print("ready", flush=True)
            asked(preemption)
            time.sleep(1)
            print("saved")
        """
    )
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.1)
    output, error = process.communicate(timeout=10)
    assert (process.returncode, output, error) == (0, "saved\n", "")


@pytest.mark.parametrize("under_nohup", [False, True])
def test_the_end_of_the_terminal_asks_unless_nohup_keeps_it_away(under_nohup: bool) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert preemption.requested is not under_nohup
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_grace_ends_the_process() -> None:
    process = start(HUNG.format(grace_s=1.0, debounce_s=0.5, hang=IN_PYTHON))
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=10)
    assert process.returncode == FORCED and 0.9 < time.monotonic() - begin < 5
    assert "preemption.grace_s=1 seconds are over" in error


def test_requests_after_the_end_change_nothing() -> None:
    process = start(
        """
        with Preemption(PreemptionConfig(debounce_s=0)) as preemption:
            print("ready", flush=True)
            asked(preemption)
        print("left", flush=True)
        time.sleep(1)
        sys.exit(85)
        """
    )
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "left\n"
    for number in SIGNALS:
        process.send_signal(number)
    assert process.wait(10) == 85


def test_a_context_without_a_request_leaves_the_signals_as_they_were() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption() as preemption:
        assert signal.getsignal(signal.SIGTERM) == preemption._handle
        assert not preemption.requested
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_forked_child_ignores_what_its_parent_is_asked_and_does_not_ask_it() -> None:
    process = start(
        """
        with Preemption(PreemptionConfig(debounce_s=0)) as preemption:
            child = os.fork()
            if not child:
                time.sleep(1.5)
                os._exit(5)
            print("ready", flush=True)
            for number in SIGNALS * 2:
                os.kill(child, number)
                time.sleep(0.1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
            assert not preemption.came
            assert signal.getsignal(signal.SIGTERM) == preemption._handle
        """
    )
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0, error


def test_a_started_program_takes_signals_as_usual() -> None:
    process = start(
        """
        import subprocess
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        with Preemption():
            print("ready", flush=True)
            for number in SIGNALS:
                helper = subprocess.Popen(["sleep", "20"])
                helper.send_signal(number)
                assert helper.wait(5) == -number
        """
    )
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0, error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grace_s": 2.0}, "preemption.grace_s=2.0 must be above debounce_s=3.0, or 0"),
        ({"debounce_s": -1.0}, "preemption.debounce_s=-1.0 must be between 0 and 60"),
        ({"exit_status": 2}, "preemption.exit_status=2 must be 0 to 127 and none of"),
        ({"exit_status": 76}, "85 is usual"),
        ({"exit_status": 137}, "must be 0 to 127"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PreemptionConfig(**settings)  # type: ignore[arg-type]
