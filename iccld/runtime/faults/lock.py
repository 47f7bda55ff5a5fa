"""Lock of a run directory: one job at a time, on one machine or on many.

Two things hold it. The operating system's `flock` ends with the process, however that ends, and decides at once between
jobs of one machine. On a shared file system it may reach no further than the machine, so the lock file also holds a
lease: its holder, and a beat that a thread of the holder rewrites every `BEAT_S`. A job elsewhere that finds a beat
watches it for up to `LEASE_S`: if the beat moves, the job is refused; if it stands still, the holder has crashed. A
clean end says so in the file, and nobody waits.
"""

import contextlib
import errno
import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from iccld.durable import make_folder, open_lock
from iccld.node import boot_id, host_name
from iccld.outcome import REFUSED
from iccld.reading import read_limited

BEAT_S = 2.0
LEASE_S = 20.0  # no beat takes so long unless the holder has crashed or its machine stands still

RELEASED = "released"
"""Content of the lock file after a clean end."""
_RECORD_BYTES = 512  # records of one length are replaced by one write, so that none is read by halves
_held: set[int] = set()


def _let_go() -> None:
    """Close the descriptors in a forked child: they would keep the lock beyond the holder's end."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Hold the folder's lock file; yield its other holder ("process 7 on node3"), or "" if it is ours.

    It takes up to `LEASE_S` seconds if a job on another machine held it last and did not end cleanly. A holder that
    stood still for so long that another took its lease ends at once, with a line on stderr and exit status 2: it must
    not write any more. Raises OSError if the folder cannot be written, ValueError if the lock file is a link.
    """
    path = make_folder(folder, within=folder) / "lock"
    descriptor = open_lock(path)
    _held.add(descriptor)
    try:
        if holder := _holder(path, descriptor):
            yield holder
        else:
            with _beating(path, descriptor):
                yield ""
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _holder(path: Path, descriptor: int) -> str:
    """Return the lock's holder; "" once it can be taken."""
    flock_decides = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _name(_read(path))
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        flock_decides = False  # a file system mounted without locks
    record = _read(path)
    if record in ("", RELEASED) or (flock_decides and _machine() in record):
        return ""
    print(f"{path} names {_name(record)}; waiting up to {LEASE_S:.0f} s for a sign of life", flush=True)
    limit = time.monotonic() + LEASE_S
    while (now := _read(path)) == record:
        if time.monotonic() > limit:
            return ""
        time.sleep(BEAT_S / 4)
    return "" if now in ("", RELEASED) else _name(now)


@contextlib.contextmanager
def _beating(path: Path, descriptor: int) -> Iterator[None]:
    stop, claim = threading.Event(), f"process {os.getpid()} {_machine()}"
    _write(descriptor, f"{claim}\nbeat 0")
    thread = threading.Thread(target=_beat, args=(path, descriptor, claim, stop), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        if descriptor in _held:  # not in a forked child that unwinds
            stop.set()
            thread.join()
            with contextlib.suppress(OSError):  # without it, the next holder waits as after a crash
                if _read(path).startswith(claim):
                    _write(descriptor, RELEASED)


def _beat(path: Path, descriptor: int, claim: str, stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(BEAT_S):
        beat += 1
        with contextlib.suppress(OSError):  # a file system may be away for a while
            record = _read(path)
            # Of two that took it at the same time, the one that wrote last finds itself here, and keeps it.
            if record not in ("", RELEASED) and not record.startswith(claim):
                print(f"{path} was taken over by {_name(record)}; this process ends", file=sys.stderr, flush=True)
                os._exit(REFUSED)
            _write(descriptor, f"{claim}\nbeat {beat}")


def _machine() -> str:
    """Name this machine in this boot: neither copies of one image nor a reboot make two machines one."""
    return f"on {host_name()}\nboot {boot_id() or 'unknown'}"


def _name(record: str) -> str:
    return record.partition("\n")[0] if record not in ("", RELEASED) else "another process"


def _read(path: Path) -> str:
    """Read the record; the file is opened anew, since a network file system asks the server only then."""
    return read_limited(path).decode(errors="replace").strip()


def _write(descriptor: int, record: str) -> None:
    os.pwrite(descriptor, record.encode().ljust(_RECORD_BYTES - 1) + b"\n", 0)
    os.fsync(descriptor)
