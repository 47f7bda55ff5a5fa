"""Work spread over processes, how fast it goes, and how it is stopped."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """Error: Ctrl-C or SIGTERM stopped the work; `signal` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise Stopped within the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def usable_cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def in_processes(
    function: Callable[[Any], Any], num_workers: int
) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
    """A `map` of `function` over tasks in `num_workers` processes; results come as they are finished.

    Tasks are taken from their iterable only as workers become free. One worker is this process itself. Leaving the
    block ends the workers at once, and they end when this process does, however that ends. Raises ValueError if a
    worker was killed, and for a number below 1.
    """
    if num_workers < 1:
        raise ValueError(f"--workers {num_workers} must be at least 1; the number of CPUs is usual.")
    if num_workers == 1:
        yield partial(map, function)
        return
    context = multiprocessing.get_context("spawn")  # forked, they would hold this process's locks and open files
    reader, writer = multiprocessing.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_workers, context, _begin, (function, reader))
    try:
        yield partial(_completed, pool, 2 * num_workers)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory; use fewer --workers. In a script of your own, "
            "begin under `if __name__ == '__main__':`, since workers import it."
        ) from error
    finally:
        writer.close()
        pool.shutdown(cancel_futures=True)
        reader.close()


def _completed(pool: ProcessPoolExecutor, limit: int, tasks: Iterable[Any]) -> Iterator[Any]:
    rest, pending = iter(tasks), set[Future[Any]]()
    while True:
        pending |= {pool.submit(_work, task) for task in itertools.islice(rest, limit - len(pending))}
        if not pending:
            return
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


_function: Callable[[Any], Any]


def _begin(function: Callable[[Any], Any], parent: Any) -> None:
    global _function
    _function = function
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent, which then ends its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.poll(None)  # nothing is ever sent: it returns when the parent closes its end, or is no more
    os._exit(1)


def _work(task: Any) -> Any:
    return _function(task)


def say(line: str) -> None:
    """Print a line at once, also into files and pipes."""
    print(line, flush=True)


class Progress:
    """Count what is done of `total`, and tell the speed, in `unit`s of `scale`, and the time that is left."""

    def __init__(
        self, total: int, *, unit: str = "samples", scale: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.unit, self.scale, self.done = total, unit, scale, 0
        self._clock, self._start = clock, clock()

    def advance(self, count: int) -> str:
        """Count `count` more, and return a line such as "812 samples/s, 1:12 left"."""
        self.done += count
        rate = self.done / max(self._clock() - self._start, 1e-9)
        left = round((self.total - self.done) / rate) if rate else 0
        hours, minutes = divmod(left // 60, 60)
        time_left = f"{hours}:{minutes:02d}:{left % 60:02d}" if hours else f"{minutes}:{left % 60:02d}"
        return f"{rate / self.scale:,.0f} {self.unit}/s, {time_left} left"
