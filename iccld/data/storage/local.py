"""Shards in a folder, read by `pread`, with at most 64 files open."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Self

from iccld.data.storage.base import MissingShard, Storage, StorageError, short_read

MAX_OPEN_SHARDS = 64


class _OpenFile:
    """Descriptor that closes with its last reference, since another thread may still read the file."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class LocalStorage(Storage):
    """Storage in a folder. Forked processes may share its open files, since `pread` moves no file position."""

    is_local = True
    piece_bytes = 1 << 30

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._open = lru_cache(MAX_OPEN_SHARDS)(_OpenFile)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.location,)

    def _address(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _read(self, name: str, offset: int, size: int) -> bytes:
        with _errors_of(self._address(name)):
            file = self._open(self._address(name))
            self.counters.add(requests=1)
            data = os.pread(file.descriptor, size, offset)
            if len(data) == size:
                return data
            total = os.fstat(file.descriptor).st_size
        raise short_read(self.describe(name), offset, size, total)

    def _size(self, name: str) -> int:
        with _errors_of(self._address(name)):
            return Path(self._address(name)).stat().st_size


@contextmanager
def _errors_of(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MissingShard(f"{path} does not exist") from error
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read ({error.strerror}); is its disk mounted and yours to read?"
        ) from error
