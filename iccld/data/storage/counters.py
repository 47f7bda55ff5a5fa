"""Sums that several threads add to."""

import os
import threading

_LOCK = threading.Lock()
# A child that is forked while another thread holds the lock would wait for it for ever.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


class Counters(dict[str, int]):
    """Sums by name, of one process."""

    def add(self, **amounts: int) -> None:
        """Add the amounts to the sums of these names."""
        with _LOCK:
            for name, amount in amounts.items():
                self[name] += amount
