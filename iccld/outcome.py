"""Exit status of a command that ends by an error: it says who must act.

    2     REFUSED: what the user must mend: a setting, a missing file, a loss that is not finite
    75    AGAIN: what the world did: a full disk, a lost connection, a killed worker, a node; give the command again
    76    FORCED: a stop was asked for, and the command could not end in time (`iccld.runtime.faults.preemption`)

The job script starts a run again after each status but 0, and but 2 on a first attempt that got nowhere, until it makes
no progress. An error of the system (OSError) is the user's only where it says that a name is wrong, and only before the
run's first step: what was good for a step is not wrong since.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

REFUSED = 2
AGAIN = 75  # EX_TEMPFAIL of sysexits.h
FORCED = 76

_NAMES_ARE_WRONG = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.EINVAL, errno.ELOOP, errno.EROFS, errno.ENOTEMPTY, errno.EXDEV, errno.ENXIO, errno.EADDRINUSE),
}
_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or use another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has no more open files to give",
    errno.EIO: "the disk or its server fails; try another node",
    errno.ESTALE: "its file server has forgotten it; try again, or another node",
    errno.ENOMEM: "free memory",
}
_LACK_OF_MEMORY = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_(INTERNAL_ERROR_\w+_)?ALLOC(ATION)?_FAILED|"
    r"can't allocate memory|not enough memory|bad_alloc|could not create a memory object",
    re.IGNORECASE,
)
"""Words for a lack of memory in PyTorch's RuntimeErrors: of CUDA, cuBLAS, cuDNN, the CPU's allocator, C++, oneDNN."""
_NO_DETERMINISTIC_KERNEL = re.compile(r"\S+ does not have a deterministic implementation")
_LOST_DEVICE = re.compile(
    r"ECC|NVLink|unavailable|lost|hardware|unspecified launch failure|unknown error", re.IGNORECASE
)


class Interrupted(OSError):
    """Error: the world interrupted a run; the same command goes on from where it was."""


class ToldByRank0(SystemExit):
    """The end of a rank for an error that rank 0 tells; its code is the error's status."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(status_of(error))
        self.error = error


def status_of(error: BaseException) -> int:
    """Return the exit status of an error before a run's first step; `blaming_the_world` is for later ones."""
    if not isinstance(error, OSError):
        return REFUSED
    if isinstance(error, Interrupted | ConnectionError | TimeoutError | ChildProcessError):
        return AGAIN
    return REFUSED if error.errno is None or error.errno in _NAMES_ARE_WRONG else AGAIN


_before_line = ""


def over_live_line(is_live: bool) -> None:
    """Let `say` begin by clearing the terminal's line, while one is drawn there again and again."""
    global _before_line
    _before_line = "\r\x1b[2K" if is_live and os.isatty(2) else ""


def say(line: str) -> None:
    """Write a line to stderr, also while another thread, or nobody, holds Python's stream, and if nobody reads it."""
    with contextlib.suppress(OSError):  # the scheduler's daemon at the other end may be gone
        os.write(2, f"{_before_line}{line}\n".encode())


def lacks_memory(error: BaseException) -> bool:
    """Tell whether the error says that memory, of the device or of the host, was out."""
    by_words = isinstance(error, RuntimeError) and _LACK_OF_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(by_words)


def is_understood(error: RuntimeError | MemoryError) -> bool:
    """Tell whether the error is no fault of the program, and `words` says what to do."""
    return lacks_memory(error) or bool(_NO_DETERMINISTIC_KERNEL.match(str(error)))


def words(error: BaseException) -> str:
    """Return an error's words; where a remedy is known (errors of the system, a lack of memory), also what to do."""
    text = str(error) or repr(error)
    if lacks_memory(error):
        return f"out of memory ({text.strip().splitlines()[0]}); free memory, or use a device that has more"
    if lacking := _NO_DETERMINISTIC_KERNEL.match(text):
        return f"{lacking[0]} on this device; set engine.deterministic=false, or use another backbone"
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    return f"{text}; {remedy}, and give the same command again" if remedy else text


def plain(error: Exception, *, has_trained: bool = False) -> Exception:
    """Return an error of the same words and status that can be sent to another process."""
    if not isinstance(error, OSError):
        return ValueError(words(error))
    return (Interrupted if has_trained or status_of(error) == AGAIN else OSError)(words(error))


@contextlib.contextmanager
def blaming_the_world(has_trained: Callable[[], bool]) -> Iterator[None]:
    """Turn every error of the system into Interrupted within the block, once the run has trained."""
    try:
        yield
    except OSError as error:
        if isinstance(error, Interrupted) or not has_trained():
            raise
        raise Interrupted(words(error)) from error
    except ToldByRank0 as end:
        if isinstance(end.error, OSError) and has_trained():
            end.code = AGAIN
        raise
    except RuntimeError as error:
        if type(error).__name__ != "AcceleratorError" or not _LOST_DEVICE.search(str(error)):
            raise
        raise Interrupted(f"{str(error).splitlines()[0]}; try another node") from error


@contextlib.contextmanager
def naming(path: Path, what: str = "") -> Iterator[None]:
    """Let an error of the system within the block name the file that is written, and `what` it holds."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        why = f"{what} could not be written: {error.strerror}" if what else error.strerror
        raise OSError(error.errno, why, str(path)) from error
