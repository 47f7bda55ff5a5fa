"""Work folders of `iccld shards make` and `index`, in which one process works at a time and nothing is a stranger's."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from iccld.durable import NotOursError, is_plain, make_folder, open_lock
from iccld.outcome import naming

MAKING_FOLDER = "making"
"""Of `iccld shards make`; where it is, the shards are not finished."""
_LOCK = "lock"
_OURS = re.compile(r"lock|settings\.json|samples\.npy|\d+\.(npy|json)|\d+\.\d+\.tmp|\..+\.[0-9a-f]{8}\.tmp")


def clear(work: Path) -> None:
    """Removes all that is in a work folder, but for its lock. Raises NotOursError where something is not ours."""
    _check_ours(work)
    for path in work.iterdir():
        if path.name != _LOCK:
            path.unlink()


def _check_ours(work: Path) -> None:
    """So that nobody's files are deleted, nor written through links with the names of ours."""
    strange = sorted(path for path in work.iterdir() if not (_OURS.fullmatch(path.name) and is_plain(path)))
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise NotOursError(
            f"{strange[0]}{more} is not what this command makes, plain files of its own names; move {work} away, and "
            f"give the same command again."
        )


@contextmanager
def alone_in(folder: Path, name: str) -> Iterator[Path]:
    """The work folder `name` of `folder`, held by the operating system's lock for as long as this process works there.

    It is removed at the end where nothing is left in it. Raises NotOursError where it is a link or holds what is not
    ours, ValueError where another process holds it or memory does not suffice, and an OSError that names `folder` where
    its disk is full.
    """
    work = folder / name
    try:
        descriptor = _lock(work)
        try:
            _check_ours(work)
            try:
                yield work
            finally:
                if [path.name for path in work.iterdir()] == [_LOCK]:
                    (work / _LOCK).unlink(missing_ok=True)
                    with suppress(OSError):  # another process has begun there
                        work.rmdir()
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with naming(folder):  # and not the file of the moment
            raise
    except MemoryError as error:
        raise ValueError(f"{folder}: memory does not suffice; use fewer --workers.") from error


def _lock(work: Path) -> int:
    """The locked file's descriptor; closing it frees the lock."""
    path = work / _LOCK
    while True:
        make_folder(work, within=work.parent)
        with suppress(FileNotFoundError):  # another process has just removed the folder
            descriptor = open_lock(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
                os.close(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                raise ValueError(f"{work.parent}: another process is at work there; wait for it, or end it.") from None
            except FileNotFoundError:
                os.close(descriptor)
