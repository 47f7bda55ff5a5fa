"""Storage: files side by side, in a folder, on a web server or in an object store; bytes by (name, offset, size).

`LocalStorage` is a folder; `remote.py` has the others. Several threads may use a storage, also in processes that were
forked after its first use. It may be pickled.
"""

import copy
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import unquote, urlsplit

from iccld.ranges import above, at_least, check_ranges
from iccld.redact import is_url, without_secrets

MAX_NAME_BYTES = 255
MAX_OPEN_SHARDS = 64
_LOCK = threading.Lock()
# A child that is forked while another thread holds the lock would wait for it for ever.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


@dataclass
class StorageConfig:
    """Settings of how remote shards are read; a local folder needs none of them.

    `options` go to the object store's file system as they are, "true" and "false" as bools. What is not a string there
    (`client_kwargs`) is set in the client's own files and environment (`~/.aws/config`, `AWS_REGION`). Secrets belong
    there too, and those of http(s) in `~/.netrc`: other users see a command line. Saved settings and messages hold no
    values of options, and no user, password and query of a URL.

    Some of the schemes that `allow_schemes` may name write files or run code when they open a location, as `options`
    say. So both count on the command line and in --secrets only: not in a run's saved settings, in YAML or in a grid.
    """

    timeout_s: float = 20.0  # bounds one request of at most 8 MiB
    retry_for_s: float = 300.0  # bounds all attempts of a request together, but for the end of the last; 0: one attempt
    options: dict[str, str] = field(default_factory=dict)
    """Options of the object store's file system: `endpoint_url`, `anon`, `profile`, `key`, `secret` of s3fs."""
    allow_schemes: list[str] = field(default_factory=list)
    """Further schemes of fsspec (hdfs, sftp, ...) that locations may have."""

    def __post_init__(self) -> None:
        retry_for_s = at_least(0, "300 is usual, 0 gives up at once")
        check_ranges(self, "data.storage", timeout_s=above(0, "20 is usual"), retry_for_s=retry_for_s)


class StorageError(OSError):
    """Error: a read failed for good. The message says where, what was read, why, and what to do."""


class Unreachable(StorageError, ConnectionError):
    """Error: the storage did not answer for as long as it was asked; it may answer later."""


class MissingShard(StorageError, FileNotFoundError):
    """Error: the storage has no such file."""


class ShortRead(StorageError):
    """Error: the file ends before the bytes that were asked for."""


class Counters(dict[str, int]):
    """Sums by name, of one process."""

    def add(self, **amounts: int) -> None:
        """Add the amounts to the sums of these names."""
        with _LOCK:
            for name, amount in amounts.items():
                self[name] += amount


class Storage(ABC):
    """Files by their names. `counters`: requests, retries and bytes read; those of `below` are its parent's."""

    is_local: ClassVar[bool]
    piece_bytes: ClassVar[int]
    """The largest single request; longer reads are made of several."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.counters = Counters(requests=0, retries=0, bytes=0)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read exactly the `size` bytes at `offset` of the file `name`.

        Raises MissingShard; ShortRead if the file ends before; StorageError for every other final failure.
        """
        check_name(name, self.location)
        if offset < 0 or size < 0 or offset + size > sys.maxsize:
            raise ShortRead(
                f"{self.describe(name)}: {size} bytes at {offset} cannot be in any file; make its index again."
            )
        if size <= self.piece_bytes:
            data = self._read(name, offset, size) if size else b""
        else:
            data = b"".join(self._read(name, *piece) for piece in self._pieces(offset, size))
        self.counters.add(bytes=size)
        return data

    def read_all(self, name: str, *, limit: int) -> bytes:
        """Read the whole file. Raises StorageError if it has more than `limit` bytes."""
        size = self.size(name)
        check_size(self.describe(name), size, range(limit + 1))
        return self.read(name, 0, size)

    def size(self, name: str) -> int:
        """Return the file's size in bytes. Raises the same errors as `read`."""
        check_name(name, self.location)
        return self._size(name)

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """Yield the first `size` bytes of a file, in pieces of bounded size."""
        for offset, length in self._pieces(0, size):
            yield self.read(name, offset, length)

    def below(self, folder: str) -> Self:
        """Return the storage of a folder in this one."""
        check_name(folder, self.location)
        lower = copy.copy(self)
        lower.location = self._address(folder)
        return lower

    def describe(self, name: str) -> str:
        """Name the file's location for messages, without credentials."""
        return f"{without_secrets(self.location).rstrip('/')}/{name}"

    def _address(self, name: str) -> str:
        return f"{self.location}/{name}"

    @abstractmethod
    def _read(self, name: str, offset: int, size: int) -> bytes: ...

    @abstractmethod
    def _size(self, name: str) -> int: ...

    def _pieces(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        for start in range(offset, offset + size, self.piece_bytes):
            yield start, min(self.piece_bytes, offset + size - start)


class _OpenFile:
    """Descriptor that closes with its last reference, since another thread may still read the file."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class LocalStorage(Storage):
    """Storage in a folder, with at most 64 files open.

    Forked processes may share them, since `pread` moves no file position.
    """

    is_local = True
    piece_bytes = 1 << 30

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._open = lru_cache(MAX_OPEN_SHARDS)(_OpenFile)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.location,)

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


def short_read(place: str, offset: int, size: int, total: int) -> ShortRead:
    """Make the error that says how far a read goes beyond the `total` bytes of the file at `place`."""
    return ShortRead(
        f"{place}: bytes {offset}-{offset + size - 1} are wanted, but it has {total}; it is truncated: restore it, or "
        f"make it and its index again."
    )


def check_name(name: str, location: str) -> None:
    """Raise StorageError for anything but a plain file name: a stranger may have made the index that holds it."""
    plain = name.isprintable() and not {"/", "\\"} & set(name) and name not in ("", ".", "..")
    if not plain or len(name.encode()) > MAX_NAME_BYTES:
        raise StorageError(
            f"{without_secrets(location)}: {name[:80]!r} is no plain file name of at most {MAX_NAME_BYTES} "
            f"bytes; make the index again."
        )


def check_size(place: str, size: int, sizes: range) -> None:
    """Raise StorageError if a file's size shows that it is not what it should be."""
    if size not in sizes:
        wanted = f"at most {sizes[-1]:,}" if sizes[0] == 0 else f"{sizes[0]:,} to {sizes[-1]:,}"
        raise StorageError(
            f"{place} has {size:,} bytes, and should have {wanted}; it is not what it should be: upload it again."
        )


def is_remote(location: str | Path) -> bool:
    """Tell whether a location is a URL; `file://` URLs are local."""
    return is_url(str(location))


def local_folder(location: str | Path) -> Path:
    """Return the folder that a local location means: a path or a `file://` URL."""
    text = str(location)
    return Path(unquote(urlsplit(text).path) if text.lower().startswith("file://") else text)
