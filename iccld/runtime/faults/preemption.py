"""Being asked to stop: a signal sets a flag, all ranks agree on it, the run saves and ends.

SIGUSR1 (a scheduler, before the time limit), SIGTERM (preemption), SIGINT (Ctrl-C) and SIGHUP (the end of the terminal,
unless `nohup` keeps it away) ask. Asked once more, or when `grace_s` is over, the process ends at once; checkpoints
appear by rename, so the whole ones stay whole.

Exit statuses of `iccld train`:

    0      finished; or stopped by a signal with its position saved, unless `exit_status` says another
    130    stopped by Ctrl-C (SIGINT) with its position saved, unless `exit_status` says another or a job script asked
    1      a fault of the program, or a process that could not even say what held it (its stacks)
    2      what the user must mend, in one line: the same command ends the same way again
    75     what the world did, in one line (a full disk, a lost connection, a killed worker); and STOPPED_BY_WATCHDOG: a
           rank hung or was lost, a node is unfit: start the same command again
    76     FORCED: asked twice or grace over (or an hour, through `iccld launch`); nothing was saved since the last
           whole checkpoint: start it again
    128+n  killed by signal n

Stopped is told from finished by `exit_status`, or by the last line of `events.jsonl`, which then is `preempted`.
"""

import os
import select
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

from iccld.node import host_name
from iccld.outcome import AGAIN, FORCED, say
from iccld.runtime.settings import PreemptionConfig

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STOPPED_BY_WATCHDOG = AGAIN
LOOK_S = 86_400.0  # the longest wait at once: the system takes no endless one


class Preempted(Exception):
    """Error: since a signal came, all ranks gave up work that can be done again."""


class Preemption:
    """Memory of whether a signal came. All ranks must agree (`Ranks.any`) to act on it.

    As a context, it remembers signals; a process that leaves it after one came is ending, and ignores further ones. A
    thread, which the C handler tells of signals, ends the process if its main thread no longer reacts.
    """

    came = False
    """True once a signal came."""
    by_hand = False
    """True if the first one was SIGINT, as Ctrl-C sends it."""

    def __init__(self, config: PreemptionConfig | None = None) -> None:
        self.config = config or PreemptionConfig()
        self._before: dict[int, Any] = {}
        self._wakeup = -1

    @property
    def requested(self) -> bool:
        """Return `came`, as the loop asks at each step boundary."""
        return self.came

    def __enter__(self) -> Self:
        global _installed
        reader, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        _installed = self
        threading.Thread(target=self._wait, args=(reader,), name="preemption", daemon=True).start()
        is_kept_away = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
        heard = [number for number in SIGNALS if number is not signal.SIGHUP or not is_kept_away]
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # one that came while the program started is delivered now
        return self

    def __exit__(self, *_: object) -> None:
        global _installed
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.came else before)
        signal.set_wakeup_fd(-1)
        _installed = None
        os.close(self._wakeup)  # the thread reads the pipe's end, and returns

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.by_hand = self.by_hand or (number == signal.SIGINT and not self.came)
        self.came = True

    def _wait(self, reader: int) -> None:
        first: float | None = None
        while True:
            limit = first + self.config.grace_s if first is not None and self.config.grace_s else None
            left = min(max(limit - time.monotonic(), 0.0), LOOK_S) if limit is not None else None
            numbers = os.read(reader, 4096) if select.select([reader], [], [], left)[0] else None
            if numbers == b"":
                os.close(reader)
                return
            now, asked = time.monotonic(), [number for number in numbers or b"" if number in SIGNALS]
            if asked and first is None:
                self.by_hand = self.by_hand or (asked[0] == signal.SIGINT and not self.came)
                self.came, first = True, now
            elif asked and first is not None and now - first > self.config.debounce_s:
                _force(f"{signal.Signals(asked[-1]).name} came {now - first:.0f} s after a first signal")
            elif limit is not None and now >= limit:
                _force(f"preemption.grace_s={self.config.grace_s:g} seconds are over since a signal came")


def _force(why: str) -> None:
    who = f"rank {os.environ.get('RANK', '0')} on {host_name()}"
    say(f"{who} ends at once: {why}; what was saved stays whole, and the same command goes on from there")
    os._exit(FORCED)


_installed: Preemption | None = None
_mask: set[int] = set()


def _hold() -> None:
    """Hold signals back while forking: one that met the child before `_forget` would go to its parent's pipe."""
    global _mask
    _mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask)


def _forget() -> None:
    """Forget the request in a forked child: it is its parent's, and so is the pipe."""
    global _installed
    if _installed is not None:
        signal.set_wakeup_fd(-1)
        os.close(_installed._wakeup)
        _installed = None
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a scheduler signals every process; the parent ends its children
    _release()


os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)
