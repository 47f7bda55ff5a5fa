"""End of a verb that trains or scores after a signal has stopped it."""

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iccld.config import Config

STOPPED = 85  # the outcome of a submitted job that a signal ended, for its script


def status_of_stopped(config: "Config", message: str, *, by_hand: bool) -> int:
    """Print the message once and return the exit status; for a job script it is STOPPED, whatever is configured.

    `by_hand`: Ctrl-C came, which ends a process of its own with 130 unless another status is configured. The launcher
    of several ranks hears Ctrl-C itself, and takes any status of a rank but 0 for a failure.
    """
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
    if "ICCLD_OUTCOME" in os.environ:
        return STOPPED
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return config.preemption.exit_status or (128 + signal.SIGINT if by_hand and alone else 0)
