"""Refusal of one rank, which ends all ranks with the status of a fault that the user must mend.

A rank that fails alone cannot tell the others in a collective, as they may wait in another. So it says why, leaves a
file beside the heartbeats, and ends; the others find the file when the collective breaks, or at their next beat.
"""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from iccld.durable import create, make_folder, write_whole
from iccld.outcome import REFUSED, say

SPEAKING_S = 60.0  # time for the rank that speaks to write its words down


class Refusal:
    """Refusal of an attempt. `attempt` is the same on all ranks, and new in each attempt."""

    def __init__(self, folder: Path, attempt: str) -> None:
        self._path, self._attempt = folder / "refused.txt", attempt

    def claim(self) -> None:
        """Let the first rank that asks go on; the others, which failed alike, end here when it has spoken."""
        make_folder(self._path.parent, within=self._path.parent.parent)
        try:
            create(self._path.with_suffix(".claim")).close()
        except FileExistsError:
            limit = time.monotonic() + SPEAKING_S
            while not self.is_said() and time.monotonic() < limit:
                time.sleep(0.1)
            os._exit(REFUSED)

    def refuse(self, message: str) -> NoReturn:
        """Say why, and end this rank, then the others. Call after `claim`."""
        sys.stdout.flush()
        say(f"iccld: {message}")
        with contextlib.suppress(OSError):
            if outcome := os.environ.get("ICCLD_OUTCOME"):  # rank 0 may be ended before it could leave word
                write_whole(Path(outcome), f"{REFUSED}\n")
            write_whole(self._path, f"{self._attempt}\n{message}\n")
        os._exit(REFUSED)

    def is_said(self) -> bool:
        """Tell whether a rank of this attempt has spoken."""
        with contextlib.suppress(OSError):
            return self._path.read_text().startswith(f"{self._attempt}\n")
        return False

    def forget(self) -> None:
        """Remove an earlier attempt's refusal, on one rank, before the others begin."""
        for suffix in (".txt", ".claim"):
            self._path.with_suffix(suffix).unlink(missing_ok=True)
