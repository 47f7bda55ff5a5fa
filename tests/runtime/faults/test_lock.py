"""One job a run directory: on one machine, on machines that share no flock, after crashes, beside forked children."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from iccld.runtime.faults import lock
from iccld.runtime.faults.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from iccld.runtime.faults import lock
lock.BEAT_S, lock.LEASE_S = 0.05, 1.0
if "nolock" in sys.argv:  # flock that reaches no further than its machine
    lock.fcntl.flock = lambda *_: None
if "elsewhere" in sys.argv:
    lock.host_name = lambda: "elsewhere"
if "blind" in sys.argv:
    lock._holder = lambda *_: ""
with lock.locked(Path(sys.argv[1])) as holder:
    print(f"holder={holder}", flush=True)
    sys.stdin.readline()
"""
ELSEWHERE = ("elsewhere", "nolock")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "LEASE_S", 1.0)


@contextmanager
def holding(folder: Path, *where: str) -> Iterator[subprocess.Popen[str]]:
    """Another process with the lock, on this machine or on one of another name whose flock does not reach here."""
    command = [sys.executable, "-c", HOLD, str(folder), *where]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout and process.stdout.readline() == "holder=\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def seconds_to_take(folder: Path) -> float:
    start = time.monotonic()
    with locked(folder) as holder:
        assert holder == ""
        return time.monotonic() - start


@pytest.mark.parametrize("where", [(), ELSEWHERE], ids=["here", "elsewhere"])
def test_a_living_holder_is_named(tmp_path: Path, where: tuple[str, ...]) -> None:
    with holding(tmp_path, *where) as process:
        for _ in range(2):
            with locked(tmp_path) as holder:
                host = "elsewhere" if where else os.uname().nodename
                assert holder == f"process {process.pid} on {host}"
        assert process.poll() is None, "being looked at ends nobody"


@pytest.mark.parametrize("where", [(), ELSEWHERE], ids=["here", "elsewhere"])
def test_after_a_clean_end_nobody_waits(tmp_path: Path, where: tuple[str, ...]) -> None:
    with holding(tmp_path, *where) as process:
        process.communicate("\n", timeout=20)
        assert process.returncode == 0
    assert seconds_to_take(tmp_path) < 0.2


def test_an_error_is_a_clean_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lost"), locked(tmp_path):
        raise ValueError("lost")
    assert (tmp_path / "lock").read_text().strip() == "released"


def test_a_crash_here_is_known_at_once(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        process.kill()
        process.wait()
    assert seconds_to_take(tmp_path) < 0.2


def test_a_crash_elsewhere_is_known_when_the_beat_has_stood_still(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holding(tmp_path, *ELSEWHERE) as process:
        process.kill()
        process.wait()
    assert 1.0 <= seconds_to_take(tmp_path) < 2.0
    assert f"names process {process.pid} on elsewhere; waiting up to 1 s for a sign of life" in capsys.readouterr().out


def test_a_release_while_watching_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE_S", 60.0)
    with holding(tmp_path, *ELSEWHERE) as process:
        process.send_signal(signal.SIGSTOP)  # no beat meanwhile
        time.sleep(0.1)
        subprocess.Popen(["sh", "-c", f"sleep 0.5; printf %-511s released > {tmp_path}/lock"])
        assert 0.3 < seconds_to_take(tmp_path) < 5


def test_a_holder_whose_lease_was_taken_ends_at_once(tmp_path: Path) -> None:
    """Stopped for longer than the lease, as a virtual machine may be, it must not write into another's run."""
    with holding(tmp_path, *ELSEWHERE) as process:
        process.send_signal(signal.SIGSTOP)
        with locked(tmp_path) as holder:
            assert holder == ""
            process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=20) == 2
            assert process.stderr
            errors = process.stderr.read()
            assert f"was taken over by process {os.getpid()} on" in errors and "this process ends" in errors
            time.sleep(0.2)
            assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_of_two_that_take_it_at_once_one_stays(tmp_path: Path) -> None:
    """Neither sees the other's flock, and neither found a record when it looked; the later's replaces the other's."""
    with holding(tmp_path, "nolock", "blind") as one, holding(tmp_path, *ELSEWHERE, "blind") as two:
        limit = time.monotonic() + 20
        while one.poll() is None and two.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(0.3)
        assert sorted([one.poll() is None, two.poll() is None]) == [False, True]


def test_forked_children_neither_keep_nor_beat_nor_release_it(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from iccld.runtime.faults import lock
lock.BEAT_S = 0.05
with lock.locked(Path({str(tmp_path)!r})):
    first = os.fork()
    if first == 0:
        raise SystemExit  # unwinds through the lock
    os.waitpid(first, 0)
    text = Path({str(tmp_path)!r}, "lock").read_text()
    assert text.startswith("process"), text
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout
        child = int(holder.stdout.readline())
        with locked(tmp_path) as name:
            assert name.startswith(f"process {holder.pid} on "), "children do not release it"
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # lives
        before = (tmp_path / "lock").read_text()
        time.sleep(0.3)
        assert (tmp_path / "lock").read_text() == before, "children do not beat"
        assert seconds_to_take(tmp_path) < 0.2
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()


def test_where_the_file_system_has_no_flock_the_lease_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    with holding(tmp_path) as process:
        monkeypatch.setattr(lock.fcntl, "flock", refuse)
        with locked(tmp_path) as holder:
            assert holder.startswith(f"process {process.pid} on ")
        process.kill()
        process.wait()
    assert 1.0 <= seconds_to_take(tmp_path) < 2.0


def test_other_errors_of_the_file_system_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may name a machine: unshare --uts")
def test_machines_are_told_apart_by_name(tmp_path: Path) -> None:
    """A real other host name; the crash there is watched for, as this machine's flock might not reach it."""
    hold = [sys.executable, "-c", HOLD, str(tmp_path)]
    script = 'hostname elsewhere && exec "$@"'
    command = ["unshare", "--uts", "sh", "-c", script, "sh", *hold]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    if process.stdout.readline() != "holder=\n":
        pytest.skip("unshare --uts is not permitted here")
    with locked(tmp_path) as holder:
        assert holder == f"process {process.pid} on elsewhere"
    process.kill()
    process.communicate()
    assert seconds_to_take(tmp_path) >= 1.0
