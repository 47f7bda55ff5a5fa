"""Ports, and other numbers, that tests share out: no two test processes of a machine get the same."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

RANGE = range(30_000, 32_768)  # above those of SLURM's jobs, below those from which Linux chooses by default
_held: list[TextIO] = []


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different; each is kept for this process until it ends."""
    ports = _free()
    return [next(ports) for _ in range(count)]


def free_port() -> int:
    return next(_free())


def claimed(kind: str, numbers: range) -> Iterator[int]:
    """Numbers of which nobody else holds the same kind; each is kept for this process until it ends."""
    folder = Path(tempfile.gettempdir(), f"iccld_{kind}_{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for number in numbers:
        lock = (folder / str(number)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        yield number
    raise RuntimeError(f"no number of {numbers} is free for {kind}")


def _free() -> Iterator[int]:
    for port in claimed("ports", RANGE):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:  # a server that is none of the tests' has it
            continue
        yield port
