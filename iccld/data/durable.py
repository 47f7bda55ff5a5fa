"""Files that survive a crash, and folders in which one process works at a time."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAKING_FOLDER = "making"
"""Of `iccld shards make`; where it is, the shards are not finished."""
_LOCK = "lock"


def sync(path: Path) -> None:
    """Makes a written file, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def clear(work: Path) -> None:
    """Removes all that is in a work folder, but for its lock."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


@contextmanager
def alone_in(folder: Path, name: str) -> Iterator[Path]:
    """The work folder `name` of `folder`, held by the operating system's lock for as long as this process works there.

    Raises ValueError where another process holds it, and, in one line, where disk or memory do not suffice.
    """
    work = folder / name
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / _LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another process is at work there; wait for it, or end it.") from None
            yield work
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{folder}: no space is left on its disk; make room, and give the same command again."
        ) from error
    except MemoryError as error:
        raise ValueError(f"{folder}: memory does not suffice; use fewer --workers.") from error
