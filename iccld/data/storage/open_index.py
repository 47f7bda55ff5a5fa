"""Opening of a set's index: in its folder, or, for a remote set, from a copy that each node makes once."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from iccld.data.deflate import crc32
from iccld.data.storage import integrity
from iccld.data.storage.base import MissingShard, Storage, StorageError, check_name, check_size, is_remote, local_folder
from iccld.data.storage.index import (
    ARRAY_FILES,
    HEADER_FILE,
    INDEX_FOLDER,
    MAX_HEADER_BYTES,
    ShardIndex,
    array_bytes,
    file_crc32,
    parse_header,
)
from iccld.durable import locked, make_folder, remove_left_overs, replacing, write_whole
from iccld.reading import read_limited
from iccld.redact import without_secrets

_LEFT_OVER_AFTER_S = 86_400.0


def open_index(
    storage: Storage, location: str, *, setting: str = "shards", cache_folder: str | Path = ""
) -> ShardIndex:
    """Open the index of the set at `location`. A remote index is copied once a node, and again if it has changed."""
    if not is_remote(location):
        return ShardIndex.open(local_folder(location), setting=setting)
    public = without_secrets(location)
    where = f"{setting}={public}: {INDEX_FOLDER}/{HEADER_FILE}"
    indexed = storage.below(INDEX_FOLDER)
    try:
        text = indexed.read_all(HEADER_FILE, limit=MAX_HEADER_BYTES)
    except MissingShard as error:
        raise ValueError(f"{where} is missing ({error}); upload the folder {INDEX_FOLDER}/ with the shards.") from error
    header = parse_header(text, where)
    version = "-".join(f"{sum_:08x}" for sum_ in (crc32(text), *(header.checksums[name] for name in ARRAY_FILES)))
    kept = Path(cache_folder) if cache_folder else user_cache_folder()
    folder = make_folder(kept / INDEX_FOLDER / version, within=kept)
    for name, sizes in array_bytes(header).items():
        if _may_be_damaged(folder / name, sizes):
            fetch_file(indexed, name, folder, checksum=header.checksums[name], sizes=sizes)
    path = folder / HEADER_FILE
    if not path.is_file() or read_limited(path, MAX_HEADER_BYTES) != text:
        write_whole(path, text)
    return ShardIndex.open(public, setting=setting, folder=folder)


def _may_be_damaged(copy: Path, sizes: range) -> bool:
    """Tell whether to check a copy now. A large one takes minutes and is checked beside the work."""
    return not copy.is_file() or (size := copy.stat().st_size) not in sizes or size <= integrity.AT_ONCE_BYTES


def user_cache_folder() -> Path:
    """Return the folder of this user's copies of remote indices, if none is set.

    It is `iccld` in `$XDG_CACHE_HOME`, or in `~/.cache`.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "iccld"
    try:
        return Path.home() / ".cache" / "iccld"
    except RuntimeError as error:
        raise ValueError("This user has no home folder for copies of indices; set data.cache.folder.") from error


def fetch_file(storage: Storage, name: str, folder: Path, *, sizes: range, checksum: int) -> Path:
    """Copy a file of one of `sizes` into `folder`, in pieces, and return its path; it appears whole or not at all.

    A copy that has the `checksum` (CRC-32) is kept; the bytes that arrive are checked. Ranks that ask at the same time
    wait for the one that copies. Raises the errors of reading, and StorageError if size or checksum differ or the disk
    is full.
    """
    check_name(name, storage.location)
    path = folder / name
    while not path.is_file() or file_crc32(path) != checksum:
        before = _version(path)
        with locked(folder / f".{name}.lock"):  # without locks every rank copies, which is slower but correct
            if _version(path) == before:
                _copy(storage, name, path, checksum, sizes)
                return path
    return path


def _version(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _copy(storage: Storage, name: str, path: Path, checksum: int, sizes: range) -> None:
    size, free = storage.size(name), shutil.disk_usage(path.parent).free
    check_size(storage.describe(name), size, sizes)
    if size > free:
        raise StorageError(
            f"{storage.describe(name)}: its {size:,} bytes do not fit into {path.parent} ({free:,} are free); make "
            f"room, or set data.cache.folder to a larger disk."
        )
    remove_left_overs(path.parent, of=name, older_than_s=_LEFT_OVER_AFTER_S)
    found = 0
    with replacing(path) as file:
        for piece in storage.pieces(name, size):
            file.write(piece)
            found = crc32(piece, found)
        if found != checksum:
            raise StorageError(
                f"{storage.describe(name)}: its checksum is {found:08x}, it should be {checksum:08x}; upload it again."
            )
