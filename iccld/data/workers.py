"""Loader workers and signals: those meant for the training process, in a worker; a worker's death, in the process."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

ORPHANED_S = 2.0  # between two looks at whether the parent still lives
SWITCH_S = 1e-3  # the training process waits for a worker's thread that hands tensors over, Python's 5 ms for each


class WorkerDied(ChildProcessError):
    """A loader worker ended that should not have; the same command may do better."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Around the start of workers: until `initialize_worker`, they hold back what is for their parent's handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def initialize_worker(worker_id: int) -> None:
    """Prepares a loader worker (the `worker_init_fn` of its loader): one thread, quick to hand over, deaf to signals.

    A scheduler signals every process of a job. If workers took SIGUSR1 or SIGTERM the default way, they would die and
    take the training process with them before it has saved; if they kept its handlers, they would act as it does.
    """
    del worker_id
    sys.excepthook = _end  # Python's thread that hands tensors over would say what fails, and try again for ever
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_S)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # A loader that closes, or an interpreter that exits, ends its workers by SIGTERM: that one must work.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an ignored one need not be queued
    threading.Thread(target=_obey_the_parent, args=(os.getppid(),), daemon=True).start()


def _end(kind: type[BaseException], error: BaseException, trace: object) -> None:
    os.write(2, f"a loader worker ends: {kind.__name__}: {error}\n".encode())
    os._exit(1)


def _obey_the_parent(parent: int) -> None:
    while os.getppid() == parent:  # one that ended at once has told nobody
        came = signal.sigtimedwait({signal.SIGTERM}, ORPHANED_S)
        if came is not None and came.si_pid == parent:
            break
    os._exit(0)  # 0, so that the parent does not take it for a worker that failed


def hearing_deaths_within(deliveries: Iterator[T]) -> Iterator[T]:
    """The deliveries of a loader just made.

    torch's handler of SIGCHLD raises wherever the main thread is when a worker dies, in the midst of a step too. Here
    it does so while a delivery is awaited, and then also for a worker that died before.
    """
    if threading.current_thread() is not threading.main_thread():  # where there are no handlers
        yield from deliveries
        return
    handler: Any = signal.getsignal(signal.SIGCHLD)
    try:
        while True:
            signal.signal(signal.SIGCHLD, handler)
            if callable(handler):
                handler(signal.SIGCHLD, None)
            delivery = next(deliveries)
            handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield delivery
    except StopIteration:
        return
    finally:
        signal.signal(signal.SIGCHLD, handler)
