"""Samples kept on the node's own disk, so that remote ones are fetched once: bounded, shared by all processes.

    FOLDER/samples/3f/3f9c...e1   an entry: 8 bytes that say how long it is, and the sample
    FOLDER/samples/3f/lock        held while something is put in the bucket; the bytes in it, and when to look for room

An entry is in one of 256 buckets by the hash of its key, and each bucket has its share of the budget: so there is no
global state, and what is put in one bucket never waits for another. Getting takes no lock.

A full bucket takes no more, unless it has entries that nobody has read for a day. In an epoch's permuted order, every
other replacement loses: what is in the cache comes up once more this epoch, what was just read only in the next. With
room for half of a set, keeping gives 50 % of hits and replacing the least recently used 15 % (1 - s + s ln s for a
missing share s).
"""

import fcntl
import hashlib
import logging
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from iccld.data.storage.base import Counters
from iccld.durable import NotOursError, create, is_plain, make_folder, open_lock, open_to_read, refuse_links

logger = logging.getLogger(__name__)

NUM_BUCKETS = 256
UNREAD_FOR_S = 86_400.0
TOUCH_EVERY_S = 3_600.0
LOOK_EVERY_S = 60.0
ROOM_TO_MAKE = 0.1
"""The share of a bucket that is freed at once if its entries are unread, so that not every new one searches."""
_OURS = re.compile(r"lock|[0-9a-f]{32}")
_LENGTH = struct.Struct("<Q")
_STATE = struct.Struct("<Qd")
_BLOCK = 4096


@dataclass
class CacheConfig:
    """Settings of the cache on the node's own disk: its folder, which several runs may share, and its size.

    A sample larger than 1/256 of `max_gib` is not kept.
    """

    folder: str = ""  # on the node's own disk; empty: no cache
    max_gib: float = 100.0  # how much of it samples may take

    def __post_init__(self) -> None:
        if not 0 < self.max_gib < float("inf"):
            raise ValueError(
                f"data.cache.max_gib={self.max_gib} must be positive; an empty data.cache.folder turns the cache off."
            )


class SampleCache:
    """Bytes by key. Entries may be old or another process's: verify them, and `discard` bad ones.

    `counters`: hits, misses, puts, evictions; `full`, puts for which there was no room; `too_large`, those for which
    there never is; `busy`, those that would have waited for another process; `failures` of the disk. Raises ValueError
    if the folder cannot be used.
    """

    setting, contents, without = "data.cache", "samples", "samples come from the storage"
    """Name in messages, and of the sub-folder; a cache of something else is a subclass with other names."""
    num_buckets = NUM_BUCKETS
    waits = False
    """Choice of a put while another process fills the same bucket: True waits, False leaves it out."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.counters = Counters(hits=0, misses=0, puts=0, evictions=0, full=0, too_large=0, busy=0, failures=0)
        self._bucket_bytes = int(config.max_gib * 2**30) // self.num_buckets
        self._folder = Path(config.folder)
        self._samples = self._folder / self.contents
        self._writes = True
        try:
            with self._locked(self._samples):
                pass
        except OSError as error:
            raise ValueError(
                f"{self.setting}.folder={config.folder} cannot be written to or locked ({error.strerror}); use a "
                f"folder of this node's disk, or '' for no cache."
            ) from error

    def __reduce__(self) -> tuple[type["SampleCache"], tuple[CacheConfig]]:
        return type(self), (self.config,)

    def get(self, key: str) -> bytes | None:
        """Return the bytes under the key; None if there are none, or their file is not whole."""
        data = None
        try:
            data = self._entry(self._path(key))
        except (OSError, NotOursError) as error:
            self._report(error)
        self.counters.add(**{"misses" if data is None else "hits": 1})
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep the bytes if there is room. Errors of the disk are counted and never raised."""
        size = _on_disk(_LENGTH.size + len(data))
        if not self._writes:
            return
        if size > self._bucket_bytes:
            self.counters.add(too_large=1)
            return
        path = self._path(key)
        try:
            with self._locked(path.parent) as lock:
                if lock is None:
                    self.counters.add(busy=1)
                elif not os.path.lexists(path):
                    self._insert(path, data, size, lock)
        except (OSError, NotOursError) as error:
            self._writes = False
            self._report(error)

    def discard(self, key: str) -> None:
        """Remove the entry of the key."""
        path = self._path(key)
        try:
            with self._locked(path.parent) as lock:
                path.unlink(missing_ok=True)
                if lock is not None:
                    os.ftruncate(lock, 0)  # to be counted again
        except (OSError, NotOursError) as error:
            self._report(error)

    def _path(self, key: str) -> Path:
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self._samples / f"{int(digest[:2], 16) % self.num_buckets:02x}" / digest

    def _entry(self, path: Path) -> bytes | None:
        refuse_links(path.parent, within=self._folder)
        try:
            descriptor = open_to_read(path)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if os.fstat(descriptor).st_size > self._bucket_bytes:  # not an entry
                path.unlink(missing_ok=True)
                return None
            length, data = file.read(_LENGTH.size), file.readall()
            age = time.time() - os.fstat(descriptor).st_mtime
            if not 0 <= age < TOUCH_EVERY_S:
                with suppress(OSError):  # another user's
                    os.utime(descriptor)
        if len(length) < _LENGTH.size or _LENGTH.unpack(length)[0] != len(data):
            path.unlink(missing_ok=True)
            return None
        return data

    @contextmanager
    def _locked(self, bucket: Path) -> Iterator[int | None]:
        """Hold the bucket's lock file; yields None if another process holds it."""
        lock = open_lock(make_folder(bucket, within=self._folder) / "lock")
        try:
            held = True
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if self.waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = False
            yield lock if held else None
        finally:
            os.close(lock)

    def _insert(self, path: Path, data: bytes, size: int, lock: int) -> None:
        state = os.pread(lock, _STATE.size, 0)
        used, look_at = _STATE.unpack(state) if len(state) == _STATE.size else (self._bucket_bytes + 1, 0.0)
        if used + size > self._bucket_bytes and time.time() >= look_at:
            used, look_at = self._make_room(path.parent, size)
            os.pwrite(lock, _STATE.pack(used, look_at), 0)
        if used + size > self._bucket_bytes:
            self.counters.add(full=1)
            return
        # Counted before it is written: after a kill in between, the bucket holds less than its count, never more.
        os.pwrite(lock, _STATE.pack(used + size, look_at), 0)
        temporary = path.parent / "incoming"
        _remove_plain(temporary)  # left by a killed process
        new = create(temporary)
        try:
            with new as file:
                file.write(_LENGTH.pack(len(data)))
                file.write(data)
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self.counters.add(puts=1)

    def _make_room(self, bucket: Path, size: int) -> tuple[int, float]:
        """Count the bucket and free a part of it if entries are unread; return its bytes and when to look again."""
        _remove_plain(bucket / "incoming")
        now, entries = time.time(), []
        for path in filter(lambda path: _OURS.fullmatch(path.name), bucket.iterdir()):
            with suppress(FileNotFoundError):  # discarded by another process
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    entries.append((status.st_mtime, _on_disk(status.st_size), path))
        used, entries = sum(e[1] for e in entries), sorted(e for e in entries if e[2].name != "lock")
        limit = self._bucket_bytes - size
        if used > limit:
            limit -= int(ROOM_TO_MAKE * self._bucket_bytes)
        while entries and used > limit and now - entries[0][0] > UNREAD_FOR_S:
            _, freed, path = entries.pop(0)
            path.unlink(missing_ok=True)
            used -= freed
            self.counters.add(evictions=1)
        oldest = entries[0][0] if entries else now
        return used, min(max(oldest + UNREAD_FOR_S, now + LOOK_EVERY_S), now + UNREAD_FOR_S)

    def _report(self, error: OSError | NotOursError) -> None:
        """Count a failure, and report the first one of this process."""
        if not self.counters["failures"]:
            what = error.strerror if isinstance(error, OSError) else error
            logger.warning("%s.folder=%s: %s; %s.", self.setting, self.config.folder, what, self.without)
        self.counters.add(failures=1)


def _remove_plain(path: Path) -> None:
    if is_plain(path):
        path.unlink(missing_ok=True)


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
