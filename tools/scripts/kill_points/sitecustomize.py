"""Ends a rank, or its whole launch, by SIGKILL at a chosen file operation.

Python runs this file when it starts with its folder on PYTHONPATH; it does nothing outside the ranks of a kill drill.

KILL_DRILL_POINT="KIND EVENT PATTERN N WHO": just before the N-th operation EVENT (an audit event's name) on a path that
the regular expression PATTERN is found in, kill WHO ("rank", or "launch": every rank and the launcher), after KIND has
been added to the file KILL_DRILL_LOG.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _hook(kind: str, event: str, pattern: str, number: int, who: str) -> Callable[[str, tuple[Any, ...]], None]:
    expression, lock, seen = re.compile(pattern), threading.Lock(), [0]

    def look(name: str, arguments: tuple[Any, ...]) -> None:
        if name != event:
            return
        path = arguments[1] if name == "os.rename" else arguments[0]  # what it becomes
        if not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.fsdecode(path)
        if name == "os.remove" and arguments[1] >= 0 and not path.startswith("/"):  # relative to an open folder
            path = str(Path(f"/proc/self/fd/{arguments[1]}").readlink() / path)
        if expression.search(path):
            with lock:
                seen[0] += 1
                if seen[0] == number:
                    _kill(kind, who)

    return look


def _kill(kind: str, who: str) -> None:
    with Path(os.environ["KILL_DRILL_LOG"]).open("a") as log:
        log.write(f"{kind}\n")
    if who == "launch" and os.getppid() == _started_by:  # else another rank killed it, and init's children are others
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(_started_by)
            for process in [launcher, *launcher.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.pid != os.getpid():
                        process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


_started_by = os.getppid()

if "RANK" in os.environ and "KILL_DRILL_POINT" in os.environ:
    _kind, _event, _pattern, _number, _who = os.environ["KILL_DRILL_POINT"].split(" ")
    sys.addaudithook(_hook(_kind, _event, _pattern, int(_number), _who))
