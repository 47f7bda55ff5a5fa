"""Files that survive a crash, and folders in which one process works at a time."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

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

    It is removed at the end where nothing is left in it. Raises ValueError where another process holds it, and, in one
    line, where disk or memory do not suffice.
    """
    work = folder / name
    try:
        with _lock(work):
            try:
                yield work
            finally:
                if [path.name for path in work.iterdir()] == [_LOCK]:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{folder}: no space is left on its disk; make room, and give the same command again."
        ) from error
    except MemoryError as error:
        raise ValueError(f"{folder}: memory does not suffice; use fewer --workers.") from error


def _lock(work: Path) -> IO[str]:
    """The locked file; closing it frees the lock."""
    path = work / _LOCK
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process has just removed the folder
            file = path.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
                file.close()
            except BlockingIOError:
                file.close()
                raise ValueError(f"{work.parent}: another process is at work there; wait for it, or end it.") from None
            except FileNotFoundError:
                file.close()
