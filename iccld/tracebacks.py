"""Display of a fault of the program: one line, and the traceback only by `--debug`; else a file keeps it."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from iccld.durable import write_whole
from iccld.node import launched_rank
from iccld.redact import redact, without_known

_folders: list[Path] = []


def keep_tracebacks_in(folder: Path) -> None:
    """Let tracebacks be kept in this folder of a run, not in the folder of temporary files."""
    _folders.append(folder)


def guard_tracebacks(given: Iterable[str], *, debug: bool = False) -> None:
    """Show every later fault as one line, or by `debug` a traceback, without the secrets of the settings `given`."""
    words = list(given)

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        del kind
        text = text_of(error.with_traceback(trace), words)
        said = text if debug else f"{_line(error, words)} ({_kept(text)}).\n"
        print(said, end="", file=sys.stderr, flush=True)

    sys.excepthook = show


def text_of(error: BaseException, given: Iterable[str]) -> str:
    """Return an error's traceback without the secrets of the settings `given`."""
    return redact(without_known("".join(traceback.format_exception(error)), ()), given)


def _line(error: BaseException, given: list[str]) -> str:
    said = redact(without_known(" ".join("".join(traceback.format_exception_only(error)).split()), ()), given)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "iccld" in Path(frame.filename).parts] or frames
    where = f" in {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
    shown = "".join(c if c.isprintable() else " " for c in said[:500])
    return f"iccld: {f'rank {rank}: ' if (rank := launched_rank()) else ''}a fault of the program{where}: {shown}"


def _kept(text: str) -> str:
    """Keep a traceback for the user alone, and say where."""
    folder = _folders[-1] if _folders and _folders[-1].is_dir() else Path(tempfile.gettempdir())
    path = folder / f"iccld_traceback_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}.txt"
    try:
        write_whole(path, text, durably=False, mode=0o600)
    except OSError:
        return "--debug shows the traceback"
    return f"please report it with its traceback, {path}; --debug shows it here"
