"""Content of a tar, whoever made it: where its samples lie, and what is wrong with any byte of it."""

import os
import re
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import NamedTuple

from iccld.data.shards.tally import Tally, plain
from iccld.data.storage.files import open_file, packed_by

MAX_KEY_BYTES = 1024
MAX_HEADER_BYTES = 2**24
"""The most that a header may announce for a name or other facts; it is read at once."""
_MAX_LINKS = 40
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
"""Errors that tarfile raises on headers that are broken or hostile."""
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset uses these itself
_KINDS = {tarfile.FIFOTYPE: "a FIFO", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device"}
LEAVE_OUT = "or leave out what is bad with --accept-bad"


@dataclass(frozen=True)
class Problem:
    """Unusable thing: its file (and key), what is wrong with it, and what to do."""

    file: str
    what: str
    remedy: str
    key: str = ""

    def __str__(self) -> str:
        sample = f"sample {self.key!r}: " if self.key else ""
        return f"{plain(self.file)}: {sample}{self.what}; {self.remedy}."


class Unusable(Exception):
    """Error that carries a problem to the code that collects problems."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Place(NamedTuple):
    """Range of a member's bytes in its tar."""

    offset: int
    size: int


class Fault(NamedTuple):
    """Reason why a member's bytes cannot be used, and what to do."""

    what: str
    remedy: str


class _Link(NamedTuple):
    """Link to the member `target`; `broken` is its fault if there is no such member."""

    target: str
    broken: Fault


Members = dict[str, dict[str, Place | Fault]]
"""Members by extension, of each sample by its key."""


class TarContents(NamedTuple):
    """A tar's samples, in its order, what is wrong with the tar, and what in it is no member of a sample."""

    samples: Members
    problems: list[Problem]
    passed_over: Tally


def read_members(path: Path) -> TarContents:
    """Read the headers of a tar. Raises OSError, and ValueError if it is not a file.

    Members of one key need not be adjacent. Of two members with one name, the first counts. A link to another member,
    hard or symbolic, stands for that member's bytes.
    """
    scan = _Scan(path)
    with open_file(path) as file:
        try:
            scan.read_headers(file)
            scan.read_end(file)
        except _TAR_ERRORS as error:
            scan.note_damage(file, error)
    scan.resolve_links()
    return TarContents(scan.samples, scan.problems, scan.passed_over)  # type: ignore[arg-type] - no links are left


class _Headers:
    """Tar as tarfile reads it, without the memory that a false size would take."""

    def __init__(self, file: BufferedReader) -> None:
        self.tell, self.seek, self._read = file.tell, file.seek, file.read

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


class _Scan:
    """State of one pass over a tar."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        self.samples: dict[str, dict[str, Place | Fault | _Link]] = {}
        self.problems: list[Problem] = []
        self.passed_over = Tally()
        self._others: dict[str, Place | Fault | _Link] = {}
        self._spellings: dict[str, str] = {}
        self._has_links = False

    def read_headers(self, file: BufferedReader) -> None:
        """Note every member, up to the one after which tarfile sees no more."""
        size = os.fstat(file.fileno()).st_size
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            while member := tar.next():
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - it would hold them all
                if member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                self.position = member.offset
                if not member.isfile() or member.issparse() or member.offset_data + member.size <= size:
                    self._add(member)
            self.position = tar.offset

    def read_end(self, file: BufferedReader) -> None:
        """Look for the end mark, which tarfile does not ask for, and for what may follow it."""
        file.seek(self.position)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("there is no end mark")
        while chunk := file.read(2**20):
            if chunk != bytes(len(chunk)):
                start = file.tell() - len(chunk.lstrip(b"\0"))
                count = os.fstat(file.fileno()).st_size - start
                what = f"{count} bytes follow its end mark, from byte {start} on (another tar, joined to it?)"
                remedy = f"join tars with `tar --concatenate`, cut off what is none of it, {LEAVE_OUT}"
                self.problems.append(Problem(str(self.path), what, remedy))
                return

    def note_damage(self, file: BufferedReader, error: BaseException) -> None:
        """Add the problem that ended the pass."""
        file.seek(0)
        packer, command = packed_by(file.read(8)) if not self.position else ("", "")
        what, remedy = f"cut off or damaged from byte {self.position} on ({error})", "make or fetch it again"
        if packer:
            what, remedy = f"packed by {packer}, its samples have no address", f"unpack it first ({command})"
        self.problems.append(
            Problem(str(self.path), f"it is no whole, uncompressed tar: {what}", f"{remedy}, {LEAVE_OUT}")
        )

    def _add(self, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        name = member.name.removeprefix("./")
        entry = _entry(member, plain(name))
        self._has_links |= isinstance(entry, _Link)
        if (split := split_name(name)) is None:
            self._others[name] = entry
            self._pass_over(name, entry)
            return
        key, extension = self._spelled(split[0]), split[1]
        fields = self.samples.setdefault(key, {})
        if extension in fields:
            remedy = f"make keys unique, {LEAVE_OUT} (the first one counts)"
            self.problems.append(Problem(str(self.path), f"{plain(name)} is there twice", remedy, key))
            return
        fields[extension] = entry
        if name[0] == "/" or "\\" in name or ".." in name.split("/"):
            kind = "members with absolute names, or with .. or \\ in them; their keys are kept as they are"
            self.passed_over.add(kind, f"{self.path.name}: {name}")

    def _spelled(self, key: str) -> str:
        """Return a key as it was first spelled: two systems may compose its accents in two ways."""
        return key if key.isascii() else self._spellings.setdefault(unicodedata.normalize("NFC", key), key)

    def _pass_over(self, name: str, entry: Place | Fault | _Link) -> None:
        kind = _why_passed_over(name)
        if isinstance(entry, Fault):
            kind = "of other kinds than files"
        if not isinstance(entry, _Link) or name.rpartition("/")[2].startswith("."):
            self.passed_over.add(f"members passed over: {kind}", f"{self.path.name}: {name}")

    def resolve_links(self) -> None:
        """Replace each link by the member that it leads to."""
        if not self._has_links:
            return
        for fields in self.samples.values():
            for extension, entry in fields.items():
                fields[extension] = self._follow(entry)
        folders = {"."} | {folder for key in self.samples for folder in _folders_of(key)}
        for name, entry in self._others.items():
            if isinstance(entry, _Link) and not name.rpartition("/")[2].startswith("."):
                self._note_link(name, entry, folders)

    def _note_link(self, name: str, link: _Link, folders: set[str]) -> None:
        """Count a link that is no sample's; it may stand for a whole folder of samples."""
        found = self._follow(link)
        if isinstance(found, Fault) and link.target not in folders:
            self.problems.append(Problem(str(self.path), found.what, found.remedy))
        else:
            kind = "links to folders in the tar" if link.target in folders else _why_passed_over(name)
            self.passed_over.add(f"members passed over: {kind}", f"{self.path.name}: {name}")

    def _follow(self, entry: Place | Fault | _Link) -> Place | Fault:
        found: Place | Fault | _Link | None = entry
        for _ in range(_MAX_LINKS):
            if isinstance(found, Place | Fault):
                return found
            found = found and self._find(found.target)
        assert isinstance(entry, _Link)
        return entry.broken

    def _find(self, name: str) -> Place | Fault | _Link | None:
        if (split := split_name(name)) is None:
            return self._others.get(name)
        return self.samples.get(self._spelled(split[0]), {}).get(split[1])


def _entry(member: tarfile.TarInfo, name: str) -> Place | Fault | _Link:
    if member.issparse():
        return Fault(f"{name} is stored sparse", f"pack without tar's --sparse, {LEAVE_OUT}")
    if member.isfile():
        return Place(member.offset_data, member.size)
    link = plain(member.linkname)
    if member.islnk():
        what = f"{name} is a hard link to {link}, which is no file of this tar"
        return _Link(normpath(member.linkname), Fault(what, f"pack with tar's --hard-dereference, {LEAVE_OUT}"))
    if member.issym():
        what = f"{name} is a symbolic link to {link}, which is no file of this tar"
        target = normpath(join(dirname(member.name), member.linkname))
        return _Link(target, Fault(what, f"pack with tar's --dereference, {LEAVE_OUT}"))
    kind = _KINDS.get(member.type, f"a member of the unknown type {member.type!r}")
    return Fault(f"{name} is {kind}, no file", f"pack files only, {LEAVE_OUT}")


def _why_passed_over(name: str) -> str:
    if name.rpartition("/")[2].startswith("."):
        return "hidden names"
    return "names of webdataset's own (__NAME__)" if _SKIPPED.match(name) else "names without an ending"


def _folders_of(key: str) -> Iterator[str]:
    while key := dirname(key).rstrip("/"):
        yield key


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case extension of a member; None for members that webdataset passes over.

    As in webdataset, the extension starts at the first dot of the file's name.
    """
    directory, _, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot or _SKIPPED.match(name):
        return None
    return (f"{directory}/{stem}" if directory else stem), extension.lower()


def key_fault(key: str) -> str:
    """Say what makes a key unfit for an index; "" if nothing does."""
    if not key.isprintable():  # nor are bytes that are not UTF-8
        return "its key has control characters or is not UTF-8"
    size = len(key.encode())
    return f"its key has {size} bytes, {MAX_KEY_BYTES} at most" if size > MAX_KEY_BYTES else ""
