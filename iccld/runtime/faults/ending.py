"""The end of a process that trained, whatever its threads still do.

When an interpreter is taken down, a thread that comes back to it from C++ is ended by force, and groups of ranks are
destroyed while their threads hear of peers that ended: either may abort the process in place of its exit status. So a
process ends once all that Python has to do is done, and is not taken down.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NoReturn

END_S = 30.0  # for whatever is registered to be done at the end, once saves in the background are done
_awaited: set[Future[Any]] = set()


def await_at_the_end(work: Future[Any]) -> None:
    """Let the process not end before this work has, however long it takes."""
    _awaited.add(work)
    work.add_done_callback(_awaited.discard)


def run_to_the_end(program: Callable[[], int | None]) -> NoReturn:
    """Run a program, and end the process with the status that it returned or raised."""
    status = _status_of(program)
    limit = threading.Timer(END_S, os._exit, (status,))
    limit.daemon = True
    try:
        wait(tuple(_awaited))
        limit.start()
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody may read it any more
                stream.flush()
        os._exit(status)


def _status_of(program: Callable[[], int | None]) -> int:
    """As an interpreter would say it."""
    try:
        return program() or 0
    except KeyboardInterrupt:  # before the program handles it
        return 128 + signal.SIGINT
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
