"""A data set's files as its distributor gives them: a folder, a zip, or a folder of zips, seen as one tree.

Nothing is unpacked to the disk. Hidden files, `__MACOSX` and names that lead out of the tree are left out and counted.
"""

import os
import re
import stat
import unicodedata
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from iccld.data.shards.converters.pattern import has_image_ending
from iccld.data.shards.tally import Tally
from iccld.data.storage.files import kind_of, open_file
from iccld.reading import read_bytes

MAX_FILE_BYTES = 256 * 2**20
"""No image or label of a known set is a tenth as large; what is larger is a mistake or a decompression bomb."""

_HIDDEN = "hidden names, or the system's own"
_Members = dict[str, ZipInfo]


def fold(path: str) -> str:
    """Return a path without differences of case and of composed accents, as some file systems compare it."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


@dataclass
class NotSeen:
    """Things in a tree that are not among its files: (location, kind) of possible images; the rest is counted."""

    lost: list[tuple[str, str]] = field(default_factory=list)
    passed_over: Tally = field(default_factory=Tally)
    zips: set[Path] = field(default_factory=set)
    has_links: bool = False
    """Tell whether folders were read by way of links, so that a file may have two paths."""

    def add(self, location: str, what: str) -> None:
        """Note a file by the ending of its name."""
        if has_image_ending(location) and what != _HIDDEN:
            self.lost.append((location, what))
        else:
            self.passed_over.add(f"files passed over: {what}", location)


class InputTree:
    """The files below a folder, overlaid with those of the zips that lie directly in it; or the files of one zip.

    `tops` are the names that the data set's layout has at its top. Where they are found one folder deeper, that folder
    is the top, in each zip and in the folder. It can be pickled, forked and used from several processes.
    """

    def __init__(self, root: Path, *, tops: Collection[str] = ()) -> None:
        self.root = root
        if root.is_dir():
            zips = sorted(path for path in root.iterdir() if path.suffix.lower() == ".zip" and _is_seen(path.name))
            self._layers = [_Folder(root, tops), *(_Zip(path, tops) for path in zips)]
        elif root.is_file():
            self._layers = [_Zip(root, tops)]
        else:
            raise ValueError(f"--input {root}: there is no such folder or zip; give the data set's folder, or its zip.")

    def files(self, under: str = "", *, not_seen: NotSeen | None = None) -> list[str]:
        """Return the paths of all files in the folder `under`, sorted; if several layers have a path, the first is
        read.

        The case of `under` is ignored. What is passed over there is noted in `not_seen`.
        """
        noted, found = not_seen or NotSeen(), set[str]()
        for layer in self._layers:
            for path in layer.walk(under, noted):
                if path in found:
                    noted.passed_over.add("files that are there twice; one is read", layer.location(path))
                found.add(path)
        return sorted(found)

    def exists(self, path: str) -> bool:
        """Tell whether `path` is a file."""
        return self._layer(path) is not None

    def read(self, path: str) -> bytes:
        """Return a file's bytes. Raises OSError; ValueError for an absurdly large file, or a broken one in a zip."""
        layer = self._layer(path)
        if layer is None:
            raise FileNotFoundError("it is missing")
        return layer.read(path)

    def version(self, path: str) -> tuple[int, ...]:
        """Return numbers that change with a file's content: its size, and when it was written or, in a zip, its CRC-32.

        They are empty if it is missing.
        """
        with suppress(OSError):  # removed meanwhile
            layer = self._layer(path)
            return layer.version(path) if layer else ()
        return ()

    def location(self, path: str) -> str:
        """Name a file for messages: "/data/set/images/x.png" or "/data/a.zip: images/x.png"."""
        return (self._layer(path) or self._layers[0]).location(path)

    def real(self, paths: Iterable[str]) -> dict[str, str]:
        """Name the files by their real folders: the paths that linked folders give to one file have one name.

        Paths of no file are left out.
        """
        real_folder = cache(os.path.realpath)
        places = {path: layer.location(path).rpartition("/") for path in paths if (layer := self._layer(path))}
        return {path: f"{real_folder(folder)}/{name}" for path, (folder, _, name) in places.items()}

    def added_by_zips(self, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield the path and the zip's name of each file that a zip adds to those that lie in the folder itself."""
        layers = {path: self._layer(path) for path in paths} if len(self._layers) > 1 else {}
        if any(isinstance(layer, _Folder) for layer in layers.values()):
            yield from ((path, layer.path.name) for path, layer in layers.items() if isinstance(layer, _Zip))

    def _layer(self, path: str) -> "_Folder | _Zip | None":
        return next((layer for layer in self._layers if _is_seen(path) and layer.has(path)), None)


class _Folder:
    def __init__(self, root: Path, tops: Collection[str]) -> None:
        inner = [] if not tops or _has_any(root, tops) else _subfolders(root)
        holders = [folder for folder in inner if _has_any(folder, tops)]
        self.root = holders[0] if len(holders) == 1 else root

    def walk(self, under: str, not_seen: NotSeen) -> Iterator[str]:
        stack = [(folder, tuple[Path, ...]()) for folder in self._folders(under)]
        while stack:
            folder, left = stack.pop()
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if not _is_seen(entry.name):
                        not_seen.passed_over.add(f"files or folders passed over: {_HIDDEN}", entry.path)
                    elif entry.is_dir():
                        of_links = (*left, Path(entry.path).parent.resolve()) if entry.is_symlink() else left
                        loops = entry.is_symlink() and _leads_back(Path(entry.path), of_links)
                        stack += [] if loops else [(path, of_links)]
                        not_seen.has_links |= entry.is_symlink() and not loops
                        if loops:
                            not_seen.passed_over.add("links to folders passed over: they lead back", entry.path)
                    elif entry.is_file():
                        yield path
                    else:
                        not_seen.add(entry.path, f"it is {kind_of(Path(entry.path))}")

    def _folders(self, under: str) -> list[str]:
        """Return the folders that are `under`, whatever their case."""
        folders = [""]
        for name in under.split("/") if under else []:
            children = [(parent, path) for parent in folders for path in (self.root / parent).iterdir()]
            same = [(parent, path.name) for parent, path in children if fold(path.name) == fold(name) and path.is_dir()]
            folders = [f"{parent}/{child}" if parent else child for parent, child in same]
        return folders

    def has(self, path: str) -> bool:
        return (self.root / path).is_file()

    def read(self, path: str) -> bytes:
        with open_file(self.root / path) as file:
            data = read_bytes(file, MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise _too_large()
        return data

    def version(self, path: str) -> tuple[int, ...]:
        status = (self.root / path).stat()
        return status.st_size, status.st_mtime_ns

    def location(self, path: str) -> str:
        return str(self.root / path)


class _Zip:
    def __init__(self, path: Path, tops: Collection[str]) -> None:
        self.path, self.tops = path, frozenset(map(fold, tops))
        self._opened: tuple[int, ZipFile, _Members] | None = None
        self._open()  # an unreadable zip is named now, not in a worker

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _open(self) -> tuple[ZipFile, _Members]:
        if self._opened is None or self._opened[0] != os.getpid():  # processes must not share a file's position
            try:
                archive = ZipFile(self.path)
            except (BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
                remedy = "fetch it again, or move it away; other kinds of archives must be unpacked first"
                raise ValueError(f"--input: {self.path} cannot be read as a zip ({error}); {remedy}.") from error
            self._opened = (os.getpid(), archive, _members(archive, self.tops, self.path.stem))
        return self._opened[1:]

    def walk(self, under: str, not_seen: NotSeen) -> Iterator[str]:
        prefix = fold(f"{under}/") if under else ""
        archive, members = self._open()
        if self.path not in not_seen.zips:
            not_seen.zips.add(self.path)
            for path, what in _unseen(archive):
                not_seen.add(f"{self.path}: {path}", what)
        return (path for path in members if fold(path).startswith(prefix))

    def has(self, path: str) -> bool:
        return path in self._open()[1]

    def read(self, path: str) -> bytes:
        archive, members = self._open()
        info = members[path]
        if info.file_size > MAX_FILE_BYTES:
            raise _too_large()
        if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise ValueError(f"it is packed by method {info.compress_type}, which cannot be read; unpack the zip first")
        try:
            with archive.open(info) as file:  # the member may hold more than its header says
                data = file.read(MAX_FILE_BYTES + 1)
        except (BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it wants a password
            raise ValueError(f"it cannot be unpacked ({error})") from error
        if len(data) > MAX_FILE_BYTES:
            raise _too_large()
        return data

    def version(self, path: str) -> tuple[int, ...]:
        info = self._open()[1][path]
        return info.file_size, info.CRC

    def location(self, path: str) -> str:
        info = self._open()[1].get(path)
        return f"{self.path}: {info.filename if info else path}"


def _members(archive: ZipFile, tops: Collection[str], stem: str) -> _Members:
    """Return the files of a zip by their path in the tree."""
    files = {name: info for info in archive.infolist() if not _why_unseen(info, name := _name(info))}
    base, mount = _place([name.split("/") for name in files], tops, stem)
    return {mount + name.removeprefix(base): info for name, info in files.items() if name.startswith(base)}


def _name(info: ZipInfo) -> str:
    """Return the path of a zip's member, as `d/a` for `./d//a`.

    Windows' tools may write backslashes, others UTF-8 without the flag for it.
    """
    name = info.filename
    if not name.isascii() and not info.flag_bits & 0x800:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return re.sub(r"/(\.?/)+", "/", name.replace("\\", "/")).removeprefix("./")


def _why_unseen(info: ZipInfo, name: str) -> str:
    """Say why a zip's member is no file of the tree; "" if it is one."""
    if not name or name.endswith("/"):
        return "a folder"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "it is a symbolic link in a zip"
    if _is_seen(name):
        return ""
    return "its name is absolute or leads out of the zip" if {"", ".."} & set(name.split("/")) else _HIDDEN


def _unseen(archive: ZipFile) -> Iterator[tuple[str, str]]:
    """Yield the members of a zip that are no files of the tree, and why."""
    names = set[str]()
    for info in archive.infolist():
        name = _name(info)
        why = _why_unseen(info, name)
        if why != "a folder" and (why or name in names):
            yield name, why or "another file of the zip has its name"
        names.add(name)


def _place(names: Iterable[list[str]], tops: Collection[str], stem: str) -> tuple[str, str]:
    """Return the prefix to take off a zip's names, and the one to put before them, so that `tops` come first."""
    names = list(names)
    if not tops or any(fold(name[0]) in tops for name in names):
        return "", ""
    holders = {name[0] for name in names if len(name) > 1 and fold(name[1]) in tops}
    if len(holders) == 1:
        return f"{holders.pop()}/", ""
    return "", (f"{stem}/" if fold(stem) in tops else "")  # some zips lack the folder that they are named after


def _has_any(folder: Path, tops: Collection[str]) -> bool:
    folded = set(map(fold, tops))
    return any(fold(path.name) in folded for path in folder.iterdir())


def _subfolders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if _is_seen(path.name) and path.is_dir()]


def _is_seen(path: str) -> bool:
    """Tell whether a path is relative, stays within its root, and has no hidden part."""
    parts = path.split("/")
    return all(p and not p.startswith(".") and p != "__MACOSX" for p in parts) and not set(path) & set("\\\0")


def _leads_back(link: Path, folders: Iterable[Path]) -> bool:
    """Tell whether a link leads to one of the real folders, or to one around it.

    `folders` hold the link itself, and the links on the way to it: from there, the way would lead to them again.
    """
    target = link.resolve()
    return any(folder.is_relative_to(target) for folder in folders)


def _too_large() -> ValueError:
    return ValueError(f"it holds more than {MAX_FILE_BYTES / 2**20:g} MiB; no image or label is that large")
