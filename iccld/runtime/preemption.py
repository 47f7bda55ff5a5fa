"""Being asked to stop: a signal sets a flag, and the trainer acts on it at the next step boundary."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Remembers that SIGTERM or SIGUSR1 came. All ranks must agree (the engine's `any`) before one acts on it."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> "Preemption":
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
