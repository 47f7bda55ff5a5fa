"""Being asked to stop: a signal sets a flag, and the trainer acts on it at the next step boundary."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Remembers that SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) came. All ranks must agree (engine's `any`) to act on it."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> "Preemption":
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def remove(self) -> None:
        """Let the signals do again what they do by default."""
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
