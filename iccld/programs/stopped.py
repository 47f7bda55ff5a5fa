"""End of a verb that trains or scores after a signal has stopped it, and what it tells its launcher."""

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from iccld.durable import write_whole
from iccld.node import launched_rank, launched_world_size

if TYPE_CHECKING:
    from iccld.config import Config

STOPPED = 85  # the outcome of a submitted job that a signal ended, for its script
WORD = "ICCLD_LAUNCHED"
"""Variable with the file in which rank 0 leaves its exit status to `iccld launch`."""


def status_of_stopped(config: "Config", message: str, *, by_hand: bool) -> int:
    """Print the message once and return the exit status; for a job script it is STOPPED, whatever is configured.

    `by_hand`: Ctrl-C came, which ends a process of its own with 130 unless another status is configured. The launcher
    of several ranks hears Ctrl-C itself, and takes any status of a rank but 0 for a failure.
    """
    if not launched_rank():
        with contextlib.suppress(OSError):  # the terminal may have ended, which asked for the stop
            print(message, flush=True)
    if "ICCLD_OUTCOME" in os.environ:
        return STOPPED
    return config.preemption.exit_status or (128 + signal.SIGINT if by_hand and launched_world_size() == 1 else 0)


def leave_word(status: int) -> int:
    """Write the exit status for the launcher of several ranks, if there is one, and return it."""
    if (path := os.environ.get(WORD)) and not launched_rank():
        with contextlib.suppress(OSError):  # it then takes the rank for one that did not save
            write_whole(Path(path), f"{status}\n", durably=False)
    return status


def read_word(path: Path) -> int | None:
    """Read the exit status that rank 0 has left; None if it was ended before."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
