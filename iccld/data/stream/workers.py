"""Loader workers: how they start and obey, what passes between them and the training process, and how it learns of
their death.

A batch's tensors are packed into one piece of memory, so that the loader fetches one piece from a busy worker.
"""

import errno
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from mmap import ALLOCATIONGRANULARITY
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from iccld.data.config import DataConfig

T = TypeVar("T")
Batch = dict[str, dict[str, Any]]

SHARED_MEMORY = "/dev/shm"
PRELOADED = ["iccld.data.stream.stream", "iccld.data.storage.remote"]  # importing these starts no thread
PARENT_CHECK_S = 2.0  # between two checks that the parent still lives
DYING_S = 2.0  # from a broken connection until the worker's end is known
WORKER_GONE = (EOFError, ConnectionError, FileNotFoundError)  # what a fetch raises when its worker is gone
SERVER_GONE = 255  # multiprocessing's status for a worker whose server is gone
MAX_TMPDIR_BYTES = 107 - len("/pymp-01234567/listener-01234567")  # a socket's path has at most 107 bytes
SWITCH_S = 1e-3  # the training process waits for a worker's thread that hands tensors over, Python's 5 ms for each
ALIGNMENT = 64  # bytes
NUM_AHEAD = 2  # batches that a worker makes ahead
LOCKS_BYTES = 8 * 4096  # a worker's own queue, and the shared one
OF_THE_TRAINING = (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that reach every process of a job or a terminal, and are meant for the training process."""


class WorkerDied(ChildProcessError):
    """Error: a loader worker ended unexpectedly; running the same command again may succeed."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Start processes within: from their first instruction on, they block signals meant for this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*OF_THE_TRAINING, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_context(num_workers: int) -> Any:
    """Return the multiprocessing context of loader workers; None without workers.

    The training process has threads in Python and C++. A fork would copy their locks as they are, and a worker could
    wait for one for ever. So workers are forked from a server that has no threads and has imported what they need.
    """
    if not num_workers:
        return None
    prepare_workers()
    return multiprocessing.get_context("forkserver")


def prepare_workers() -> None:
    """Start the workers' server early, so that it imports while this process does other things.

    Optional: the first batch comes sooner. Raises ValueError if the folder for temporary files cannot hold its sockets.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > MAX_TMPDIR_BYTES:
        raise ValueError(
            f"TMPDIR={folder} is too long for the sockets of loader workers; set one of at most {MAX_TMPDIR_BYTES} "
            f"characters, or data.num_workers=0."
        )
    forkserver.set_forkserver_preload(PRELOADED)
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):  # the first one unblocks signals
        with signals_held():
            start()


def _send_place(array: np.memmap) -> tuple[Any, ...]:
    """Pickle a read-only memory map as file name and offset: a worker maps the file itself."""
    memory = array._mmap  # type: ignore[attr-defined]
    if memory is None or array.mode != "r" or array.filename is None:
        return np.array, (np.asarray(array),)
    begin = array.offset - array.offset % ALLOCATIONGRANULARITY  # of the map in the file
    offset = begin + array.ctypes.data - np.frombuffer(memory, np.uint8).ctypes.data
    return _map_place, (str(array.filename), offset, array.shape, array.strides, array.dtype)


def _map_place(path: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    memory = np.memmap(path, np.uint8, mode="r")
    return np.ndarray(shape, dtype, memory, offset, strides)  # type: ignore[call-overload]


ForkingPickler.register(np.memmap, _send_place)


def initialize_worker(worker_id: int) -> None:
    """Prepare a loader worker (`worker_init_fn`): one thread, a short switch interval, scheduler signals ignored.

    A scheduler signals every process of a job, and so does a terminal that ends. By default these signals would kill
    the workers, and the training process with them, before it has saved.
    """
    del worker_id
    # Python's thread that hands tensors over would report every failure and retry for ever.
    sys.excepthook = _report_and_exit
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_S)
    for number in OF_THE_TRAINING:
        signal.signal(number, signal.SIG_IGN)
    # A loader that closes, or an interpreter that exits, ends its workers by SIGTERM, which must still work.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_the_parent, args=(os.getppid(),), daemon=True).start()


def _report_and_exit(kind: type[BaseException], error: BaseException, trace: object) -> None:
    os.write(2, f"a loader worker ends: {kind.__name__}: {error}\n".encode())
    os._exit(1)


def _obey_the_parent(server: int) -> None:
    """End this worker when the training process ends or sends SIGTERM, or when the workers' server ends."""
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive() and os.getppid() == server:
        came = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_S)
        if came is not None and came.si_pid == parent.pid:
            break
    os._exit(0)  # 0: the parent must not take this for a failure


def deliveries_of(loader: Iterable[T]) -> Iterator[T]:
    """Start a loader's workers and return their deliveries. Raises OSError if the system does not let them start."""
    try:
        with signals_held():
            return _raising_deaths(iter(loader))
    except EOFError as error:
        raise WorkerDied(_death_message("did not start, since the process that starts it was killed")) from error
    except OSError as error:
        place = SHARED_MEMORY if error.errno in (errno.ENOSPC, errno.EROFS) else None
        raise OSError(error.errno, f"loader workers cannot start: {error.strerror}", place) from error


def _raising_deaths(deliveries: Iterator[T]) -> Iterator[T]:
    """Yield a loader's deliveries. Raises WorkerDied once one of its workers has ended unexpectedly.

    The loader alone would raise whatever that end broke, such as the connection that hands tensors over.
    """
    workers: list[Any] = list(getattr(deliveries, "_workers", ()))  # absent without workers
    while True:
        _check_alive(workers)
        try:
            delivery = next(deliveries)
        except StopIteration:
            return
        except Exception as error:
            _check_alive(workers, for_s=DYING_S, error=error)
            if workers and (isinstance(error, WORKER_GONE) or str(error).startswith("DataLoader worker")):
                raise WorkerDied(_death_message("ended")) from error
            raise
        yield delivery


def _check_alive(workers: list[Any], *, for_s: float = 0.0, error: Exception | None = None) -> None:
    """Raise WorkerDied, because of `error`, if a worker is dead, or is within `for_s` seconds."""
    if workers and wait([worker.sentinel for worker in workers], for_s):
        for worker in workers:
            if worker.exitcode:  # None: alive; 0: finished its work
                raise WorkerDied(_death_message(_how_it_ended(worker.exitcode), worker.pid)) from error


def _how_it_ended(status: int) -> str:
    if status == SERVER_GONE:
        return "is lost, since the process that started it was killed"
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _death_message(what: str, process: int | None = None) -> str:
    who = f"a loader worker (process {process})" if process else "a loader worker"
    return f"{who} {what}; if memory does not suffice, set fewer data.num_workers or a smaller micro-batch."


class TensorLayout(NamedTuple):
    """Place of a tensor's bytes, and how they are read."""

    begin: int
    dtype: torch.dtype
    shape: Sequence[int]  # the loader turns a tuple into a list
    stride: Sequence[int]

    def view(self, memory: Tensor) -> Tensor:
        length = torch.Size(self.shape).numel() * self.dtype.itemsize
        return memory[self.begin :][:length].view(self.dtype).as_strided(self.shape, self.stride)


class PackedBatch(NamedTuple):
    """A batch with a `TensorLayout` in `memory`, (N,) uint8, for each of its tensors."""

    batch: Batch
    memory: Tensor


def pack(batch: Batch) -> PackedBatch:
    """Copy the batch's tensors, which must be dense, into one new piece of memory; shared memory in a loader worker."""
    size = 0
    places: Batch = {name: {} for name in batch}
    for name, domain in batch.items():
        for key, value in domain.items():
            if isinstance(value, Tensor):
                places[name][key] = TensorLayout(size, value.dtype, tuple(value.shape), value.stride())
                size += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
    memory = _allocate(size)
    for name, of_domain in places.items():
        for key, place in of_domain.items():
            place.view(memory).copy_(batch[name][key])
    return PackedBatch({name: domain | places[name] for name, domain in batch.items()}, memory)


def unpack(packed: PackedBatch) -> Batch:
    """Return the batch that was packed. Its tensors are views of the memory."""
    return {
        name: {
            key: value.view(packed.memory) if isinstance(value, TensorLayout) else value
            for key, value in domain.items()
        }
        for name, domain in packed.batch.items()
    }


def shared_bytes(
    config: DataConfig, *, micro_batch_size: int, num_held: int, noise: Mapping[str, tuple[int, ...]] | None = None
) -> int:
    """Return the most shared memory, in bytes, that a rank's workers take while the rank holds `num_held` batches.

    `noise`: as `TrainingStream` takes it.
    """
    height, width = config.crop_size
    sample = height * width * (3 + 1) + height + torch.int64.itemsize  # image, label, valid, number
    batch = 2 * (micro_batch_size * sample + 4 * ALIGNMENT)  # of two domains
    for shape in (noise or {}).values():
        batch += micro_batch_size * math.prod(shape) * torch.float32.itemsize + ALIGNMENT
    num_batches = NUM_AHEAD * config.num_workers + num_held
    return (num_batches * batch + (config.num_workers + 1) * LOCKS_BYTES) if config.num_workers else 0


def _allocate(size: int) -> Tensor:
    """Allocate (size,) uint8. In a loader worker it is shared memory, which spares the loader a copy."""
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    try:
        shared = torch.UntypedStorage._new_shared(size)  # as torch's own collate function does
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        what = f"no shared memory for a batch of {size:,} bytes (set fewer data.num_workers, or mount a larger one)"
        raise OSError(errno.ENOSPC, what, SHARED_MEMORY) from error
    return torch.empty(0, dtype=torch.uint8).set_(shared)
