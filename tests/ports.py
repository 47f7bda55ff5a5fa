"""Ports for the servers and ranks that tests start: no other test process takes one, and the system gives none away."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

RANGE = range(30_000, 32_768)  # above those of SLURM's jobs, below those from which the system chooses
_held: list[TextIO] = []


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different; each is kept for this process until it ends."""
    ports = _free()
    return [next(ports) for _ in range(count)]


def free_port() -> int:
    return next(_free())


def _free() -> Iterator[int]:
    folder = Path(tempfile.gettempdir(), f"iccld_ports_{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for port in RANGE:
        lock = (folder / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:  # another test process has it, or a server that is none of the tests'
            lock.close()
            continue
        _held.append(lock)
        yield port
    raise RuntimeError(f"no port of {RANGE} is free")
