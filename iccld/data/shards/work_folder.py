"""Work folders of `iccld shards make` and `index`: one process works in each, and no stranger's file is touched."""

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
"""The work folder of `iccld shards make`; while it is there, the shards are not finished."""
_LOCK = "lock"
_OURS = re.compile(r"lock|settings\.json|samples\.npy|\d+\.(npy|json)|\d+\.\d+\.tmp|\..+\.[0-9a-f]{8}\.tmp")


def clear(work: Path) -> None:
    """Remove all that is in a work folder, but for its lock. Raises NotOursError if something there is not ours."""
    _check_ours(work)
    for path in work.iterdir():
        if path.name != _LOCK:
            path.unlink()


def _check_ours(work: Path) -> None:
    """Raise NotOursError, so that no stranger's file is deleted, or written through a link with one of our names."""
    strange = sorted(path for path in work.iterdir() if not (_OURS.fullmatch(path.name) and is_plain(path)))
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise NotOursError(
            f"{strange[0]}{more} is not what this command makes, plain files of its own names; move {work} away, and "
            f"give the same command again."
        )


@contextmanager
def alone_in(folder: Path, name: str) -> Iterator[Path]:
    """Hold the work folder `name` of `folder` by the operating system's lock while this process works in it.

    It is removed at the end if nothing is left in it. Raises NotOursError if it is a link or holds what is not ours,
    ValueError if another process holds it or memory does not suffice, and an OSError that names `folder` if its disk is
    full.
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
        with naming(folder):  # the folder, not the file that was being written
            raise
    except MemoryError as error:
        raise ValueError(f"{folder}: memory does not suffice; use fewer --workers.") from error


def _lock(work: Path) -> int:
    """Return the locked file's descriptor; closing it frees the lock."""
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
