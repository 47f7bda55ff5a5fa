"""How a verb that trains or scores ends when a signal stopped it."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iccld.config import Config

STOPPED = 85  # the outcome of a submitted job that a signal ended, for its script


def status_of_stopped(config: "Config", message: str) -> int:
    """Print the message once and return the exit status; a job script is told by STOPPED, whatever is configured."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
    return STOPPED if "ICCLD_OUTCOME" in os.environ else config.preemption.exit_status
