"""What lies where in a tar, whoever made it, and what is wrong with it."""

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAX_KEY_BYTES = 1024
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError)
"""What tarfile raises on headers that are broken or hostile."""
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # of webdataset's own use
LEAVE_OUT = "or leave out what is bad with --accept-bad"


@dataclass(frozen=True)
class Problem:
    """Something that cannot be used: in which file (and under which key), what is wrong with it, and what to do."""

    file: str
    what: str
    remedy: str
    key: str = ""

    def __str__(self) -> str:
        sample = f"sample {self.key!r}: " if self.key else ""
        return f"{self.file}: {sample}{self.what}; {self.remedy}."


class Unusable(Exception):
    """Carries a problem to where problems are collected."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Place(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


Members = dict[str, dict[str, Place]]
"""Of each sample, by its key: the places of its members, by their extension."""


def read_members(path: Path) -> tuple[Members, list[Problem]]:
    """The whole members of a tar, in its order, and what is wrong with the tar; only headers are read.

    Members of one key need not be adjacent. Of two with one name, the first counts.
    """
    samples: Members = {}
    problems: list[Problem] = []
    size, position = path.stat().st_size, 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - it would hold them all
                if member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                position = member.offset
                if member.isfile() and (member.issparse() or member.offset_data + member.size <= size):
                    problems += _add(samples, member, path)
            position = tar.offset
            file.seek(position)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # without this mark tarfile just ends, too
                raise tarfile.ReadError("there is no end mark")
    except _TAR_ERRORS as error:
        what = f"it is no whole, uncompressed tar: cut off or damaged from byte {position} on ({error})"
        problems.append(Problem(str(path), what, f"make or fetch it again, {LEAVE_OUT}"))
    return samples, problems


def _add(samples: Members, member: tarfile.TarInfo, path: Path) -> list[Problem]:
    name = member.name.removeprefix("./")
    split = split_name(name)
    if split is None:
        return []
    key, extension = split
    if member.issparse():
        return [Problem(str(path), f"{name} is stored sparse", f"pack without tar's --sparse, {LEAVE_OUT}", key)]
    fields = samples.setdefault(key, {})
    if extension in fields:
        what = f"{name} is there twice"
        return [Problem(str(path), what, f"make keys unique, {LEAVE_OUT} (the first one counts)", key)]
    fields[extension] = Place(member.offset_data, member.size)
    return []


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member; None for those that webdataset passes over.

    As webdataset has it, the extension starts at the first dot of the file's name.
    """
    directory, _, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot or _SKIPPED.match(name):
        return None
    return (f"{directory}/{stem}" if directory else stem), extension.lower()


def key_fault(key: str) -> str:
    """What makes a key unfit for an index; empty if nothing does."""
    if not key.isprintable():  # nor are bytes that are not UTF-8
        return "its key has control characters or is not UTF-8"
    size = len(key.encode())
    return f"its key has {size} bytes, {MAX_KEY_BYTES} at most" if size > MAX_KEY_BYTES else ""
