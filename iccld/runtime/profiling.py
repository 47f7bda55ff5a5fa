"""Where a step's wall time goes, measured on the host without waiting for the device."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Sums the seconds spent in named phases until they are taken.

    `observe` is told of each phase as it begins; what is between two is `agree`: the ranks agree to go on.
    """

    def __init__(self, observe: Callable[[str], None] = lambda name: None) -> None:
        self._observe = observe
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._observe(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start
        self._observe("agree")  # after an error, it stays in the phase that it came from

    def take(self) -> dict[str, float]:
        """The seconds of each phase, and of the whole under `total`, since the last call."""
        now = time.perf_counter()
        taken = dict(self._seconds, total=now - self._since)
        self._seconds.clear()
        self._since = now
        return taken
