"""Files that appear whole, and folders that are made, written and cleared without following a link.

A folder that the user names may lead anywhere by links. What lies in it may come from anybody: a link below it is
never written through and nothing behind it is deleted. Temporary files have random names and are created exclusively,
so that no name can be prepared; a rename onto a link replaces the link itself. The umask decides who may read a file.
"""

import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

from iccld.outcome import naming

_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.tmp")


class NotOursError(ValueError):
    """Error: a link, or something else that this program did not make, is where it wants to write; it is left alone."""


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, data: bytes | str, *, durably: bool = True, mode: int = 0o666) -> None:
    """Replace a file: a reader sees the old or the new one; if `durably`, so does one after a crash of the machine.

    `mode`: the rights, less those that the umask takes.
    """
    with naming(path, "the file"), _replacing(path, durably=durably, mode=mode) as (_, file):
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path, *, durably: bool = True) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends; after an error, `path` stays as it was."""
    with _replacing(path, durably=durably) as (_, file):
        yield file


@contextmanager
def replacing_by_name(path: Path) -> Iterator[Path]:
    """Replace a file as `replacing` does, for libraries that write to a path: yields the path of an empty file."""
    with _replacing(path, durably=True) as (temporary, file):
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        if stat.S_IMODE(temporary.lstat().st_mode) != mode:  # safetensors makes files of its own that are private
            temporary.chmod(mode, follow_symlinks=False)


@contextmanager
def _replacing(path: Path, *, durably: bool, mode: int = 0o666) -> Iterator[tuple[Path, BinaryIO]]:
    name = os.fsdecode(os.fsencode(path.name)[:200])  # leaves room for the suffix within a file system's limit
    temporary = path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
    file = create(temporary, mode=mode)
    try:
        with file:
            yield temporary, file
        if durably:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durably:
        sync(path.parent)


def create(path: Path, *, mode: int = 0o666) -> BinaryIO:
    """Open a new file for writing. Raises FileExistsError if there is anything of this name, also a link."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, mode), "w+b")


def open_to_append(path: Path) -> BinaryIO:
    """Open a file to write at its end; it is made if there is none. A hard link first becomes a file of its own.

    Raises NotOursError if it is a link or no plain file.
    """
    descriptor = _open_plain(path, os.O_RDWR | os.O_APPEND)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        write_whole(path, path.read_bytes())
        descriptor = _open_plain(path, os.O_RDWR | os.O_APPEND)
    return os.fdopen(descriptor, "ab+")


def open_lock(path: Path) -> int:
    """Open a file that processes lock, and which may be written, and return its descriptor; it is made if there is
    none.

    Raises NotOursError if it is a link, a hard link, or no plain file.
    """
    descriptor = _open_plain(path, os.O_RDWR)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise NotOursError(f"{path} is a hard link, and must be a file of its own; remove it.")
    return descriptor


def open_to_read(path: Path) -> int:
    """Return the descriptor of a file in a folder that others write to. Raises NotOursError if it is no plain file."""
    return _open_plain(path, os.O_RDONLY)


def _open_plain(path: Path, flags: int) -> int:
    refuse_unless_plain(path)
    flags |= 0 if flags == os.O_RDONLY else os.O_CREAT
    # Without O_NONBLOCK, a pipe of this name would be waited for.
    descriptor = os.open(path, flags | os.O_NONBLOCK | _NO_LINK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotOursError(f"{path} is no plain file, and must be one to be written; remove it.")
    return descriptor


def is_plain_name(name: object) -> bool:
    """Tell whether a name stays within its folder: names that a file holds may lead anywhere."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and "/" not in name


def is_plain(path: Path) -> bool:
    """Tell whether there is a file that no other name leads to: no link, no hard link, no folder."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def is_real_folder(path: Path) -> bool:
    """Tell whether there is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def refuse_unless_plain(path: Path) -> None:
    """Raise NotOursError if a file is to be written, and there is a link, a folder, a pipe or the like."""
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        kind = f"a link to {path.readlink()}" if path.is_symlink() else "no plain file"
        raise NotOursError(f"{path} is {kind}, and must be a file of its own to be written; remove it.")


def refuse_links(path: Path, *, within: Path) -> None:
    """Raise NotOursError if `path`, or a folder on the way to it from `within`, is a link."""
    place = within
    for part in path.relative_to(within).parts:
        place = place / part
        if place.is_symlink():
            raise NotOursError(
                f"{place} is a link to {place.readlink()}; nothing is written through a link in {within}. Remove "
                f"it, or put all of {within} where it leads, and make {within} itself the link."
            )


def make_folder(folder: Path, *, within: Path) -> Path:
    """Make a folder, and `within`, which the user named. Raises NotOursError if one between them is a link."""
    if not within.is_dir():
        within.mkdir(parents=True, exist_ok=True)
    place = within
    for part in folder.relative_to(within).parts:
        place = place / part
        try:
            place.mkdir()
        except FileExistsError:
            refuse_links(place, within=place.parent)
            place.mkdir(exist_ok=True)
    return folder


def scratch_folder(path: Path, *, is_ours: Callable[[Path], bool]) -> Path:
    """Make a new folder beside `path`, which the caller renames to `path`; earlier ones of crashes are removed.

    Only one process at a time may make `path`. A stranger's folder of that name is left, and another name is taken.
    """
    for left_over in scratch_folders(path):
        if is_ours(left_over):
            clear_away(left_over)
    names = [f"{path.name}.tmp", f"{path.name}.{secrets.token_hex(4)}.tmp"]
    scratch = next(place for name in names if not os.path.lexists(place := path.with_name(name)))
    scratch.mkdir(parents=True)
    return scratch


def holds_only(files: str) -> Callable[[Path], bool]:
    """Return a test of a folder: it is no link, and the regular expression matches all its files' paths.

    A file's path is from the folder, as `sub/name`. Links count as files. The temporary file of a write that was cut
    off (`sub/.name.0123abcd.tmp`) counts as the file.
    """
    name, torn = re.compile(files), re.compile(r"\.([^/]+)\.[0-9a-f]{8}\.tmp")

    def is_named(path: Path) -> bool:
        cut_off = torn.fullmatch(path.name)
        return bool(name.fullmatch((path.with_name(cut_off[1]) if cut_off else path).as_posix()))

    def is_ours(folder: Path) -> bool:
        try:
            found = [path for path in walk(folder) if not is_real_folder(path)]
        except OSError:  # what cannot be listed may hold anything
            return False
        return is_real_folder(folder) and all(is_named(path.relative_to(folder)) for path in found)

    return is_ours


def walk(folder: Path) -> Iterator[Path]:
    """Yield all that lies in a folder and below it, without following links.

    Raises OSError if a folder cannot be listed, which `Path.rglob` passes over.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in (*folders, *files))


def scratch_folders(path: Path) -> list[Path]:
    """Return what lies beside `path` under the names that `scratch_folder` gives."""
    name = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.tmp")
    return [place for place in path.parent.glob("*.tmp") if name.fullmatch(place.name)]


def remove_tree(folder: Path) -> None:
    """Delete a folder; of a link in it, only the link. Raises NotOursError if the folder is itself a link."""
    refuse_links(folder, within=folder.parent)
    shutil.rmtree(folder)


def clear_away(folder: Path) -> str:
    """Delete a folder that is no longer needed. Return why it could not be deleted, or ""; the caller goes on."""
    try:
        remove_tree(folder)
    except (OSError, NotOursError) as error:  # protected, or kept by a file server while somebody reads it
        return str(error)
    return ""


def remove_left_overs(folder: Path, *, of: str = "", older_than_s: float = 0.0) -> None:
    """Delete the temporary files that a crash has left in a folder, or only those of the file `of`."""
    for path in folder.glob(f".{glob.escape(of) or '*'}.*.tmp"):
        with suppress(OSError):  # another process may have removed it; one that stays harms nobody
            if _TEMPORARY.fullmatch(path.name) and is_plain(path) and time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for it; if the file system has no locks, nothing is held."""
    descriptor = open_lock(path)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
