"""A process of our own that trains while this one waits: a signal to this one lets that one save and end."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from types import FrameType

from iccld.outcome import AGAIN, FORCED, REFUSED

POLL_S = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # USR1: before the end of a job
OF_SUBMITIT = signal.SIGUSR2
"""The signal that submitit has sent to a job before its end, and by which it puts the job into the queue again."""

RESUMABLE_STATUSES = {0, AGAIN, FORCED, -signal.SIGKILL, -signal.SIGTERM}
"""Exit statuses of runs that the same command continues; 0: stopped, and saved."""


def status_of_all(failed: Collection[int]) -> int:
    """Return the exit status for several runs, of which `failed` has those that are not finished.

    0: all are finished; 75: the same command continues all of them; 2: the user must mend one; 1: the program is at
    fault, and nothing is to be mended before.
    """
    if RESUMABLE_STATUSES.issuperset(failed):
        return AGAIN if failed else 0
    return REFUSED if REFUSED in failed else 1


def how_it_failed(status: int) -> str:
    """Say how a process failed, from its exit status, which is not 0."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"


@contextlib.contextmanager
def signals_noted(numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[list[int]]:
    """Note the signals that ask for a stop in the list, within the block; `nohup` keeps the end of a terminal away."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(number)

    is_kept_away = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in numbers if number is not signal.SIGHUP or not is_kept_away]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_child(command: Sequence[str]) -> tuple[int, int]:
    """Run a command to its end; return its exit status, and the first signal that came meanwhile, or 0.

    Each signal is passed on as SIGTERM: the first lets a training save and end, the second ends it at once. Within
    submitit's jobs, submitit hears of its own signal once the command has saved.
    """
    again = signal.getsignal(OF_SUBMITIT)
    passed_on, numbers = 0, [*SIGNALS, *([OF_SUBMITIT] if callable(again) else [])]
    with signals_noted(numbers) as came:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches us alone
            preexec_fn=_ignore_submitit,  # a job's signals reach all of its processes
        )
        while (status := process.poll()) is None:
            if passed_on < len(came):
                passed_on = len(came)
                process.terminate()
            time.sleep(POLL_S)
    if OF_SUBMITIT in came and callable(again):
        again(OF_SUBMITIT, None)
    return status, came[0] if came else 0


def _ignore_submitit() -> None:
    signal.signal(OF_SUBMITIT, signal.SIG_IGN)
