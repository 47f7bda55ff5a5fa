"""Progress of images that are segmented, on stderr, so that stdout stays the result's."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

QUIET_S = 3.0
T = TypeVar("T")


def counted(items: Iterable[T], total: int | None) -> Iterator[T]:
    """Yield the items, and show how many are done: by a bar on a terminal, elsewhere by a line every few seconds."""
    console, said_at = Console(stderr=True), time.monotonic()
    for number, item in enumerate(track(items, "segmenting", total=total, console=console)):
        if not console.is_terminal and time.monotonic() - said_at >= QUIET_S:
            said_at = time.monotonic()
            print(f"segmenting {number}" + (f" of {total}" if total else ""), file=sys.stderr, flush=True)
        yield item
