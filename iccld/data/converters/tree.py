"""A data set's files as its distributor gives them: a folder, a zip, or a folder of zips, seen as one tree.

Nothing is unpacked to the disk. Hidden files, `__MACOSX` and names that lead out of the tree are not seen.
"""

import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

MAX_FILE_BYTES = 256 * 2**20
"""No image or label of a known set is a tenth as large; what is larger is a mistake or a decompression bomb."""

_Members = dict[str, ZipInfo]


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

    def files(self, under: str = "") -> list[str]:
        """The paths of all files in the folder `under`, sorted; where several layers have a path, the first is read."""
        return sorted({path for layer in self._layers for path in layer.walk(under)})

    def exists(self, path: str) -> bool:
        """Whether `path` is a file."""
        return self._layer(path) is not None

    def read(self, path: str) -> bytes:
        """A file's bytes. Raises OSError, or ValueError for what is absurdly large or broken in a zip."""
        layer = self._layer(path)
        if layer is None:
            raise FileNotFoundError("it is missing")
        return layer.read(path)

    def location(self, path: str) -> str:
        """Where a file is, for messages: "/data/set/images/x.png" or "/data/a.zip: images/x.png"."""
        return (self._layer(path) or self._layers[0]).location(path)

    def _layer(self, path: str) -> "_Folder | _Zip | None":
        return next((layer for layer in self._layers if _is_seen(path) and layer.has(path)), None)


class _Folder:
    def __init__(self, root: Path, tops: Collection[str]) -> None:
        inner = [] if not tops or _has_any(root, tops) else _subfolders(root)
        holders = [folder for folder in inner if _has_any(folder, tops)]
        self.root = holders[0] if len(holders) == 1 else root

    def walk(self, under: str) -> Iterator[str]:
        stack = [under] if (self.root / under).is_dir() else []
        while stack:
            folder = stack.pop()
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if not _is_seen(entry.name):
                        continue
                    if entry.is_dir():
                        stack += [path] if not _is_loop(entry) else []
                    elif entry.is_file():
                        yield path

    def has(self, path: str) -> bool:
        return (self.root / path).is_file()

    def read(self, path: str) -> bytes:
        with (self.root / path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise _too_large()
        return data

    def location(self, path: str) -> str:
        return str(self.root / path)


class _Zip:
    def __init__(self, path: Path, tops: Collection[str]) -> None:
        self.path, self.tops = path, frozenset(tops)
        self._opened: tuple[int, ZipFile, _Members] | None = None
        self._open()  # an unreadable zip is named now, not in a worker

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _open(self) -> tuple[ZipFile, _Members]:
        if self._opened is None or self._opened[0] != os.getpid():  # processes must not share a file's position
            try:
                archive = ZipFile(self.path)
            except (BadZipFile, OSError) as error:
                remedy = "fetch it again, or move it away; other kinds of archives must be unpacked first"
                raise ValueError(f"--input: {self.path} cannot be read as a zip ({error}); {remedy}.") from error
            self._opened = (os.getpid(), archive, _members(archive, self.tops, self.path.stem))
        return self._opened[1:]

    def walk(self, under: str) -> Iterator[str]:
        prefix = f"{under}/" if under else ""
        return (path for path in self._open()[1] if path.startswith(prefix))

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
            with archive.open(info) as file:  # which may hold more than its header says
                data = file.read(MAX_FILE_BYTES + 1)
        except (BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it wants a password
            raise ValueError(f"it cannot be unpacked ({error})") from error
        if len(data) > MAX_FILE_BYTES:
            raise _too_large()
        return data

    def location(self, path: str) -> str:
        info = self._open()[1].get(path)
        return f"{self.path}: {info.filename if info else path}"


def _members(archive: ZipFile, tops: Collection[str], stem: str) -> _Members:
    """The files of a zip by their path in the tree."""
    files = {info.filename: info for info in archive.infolist() if not info.is_dir() and _is_seen(info.filename)}
    base, mount = _place([name.split("/") for name in files], tops, stem)
    return {mount + name.removeprefix(base): info for name, info in files.items() if name.startswith(base)}


def _place(names: Iterable[list[str]], tops: Collection[str], stem: str) -> tuple[str, str]:
    """What to take off the names of a zip, and what to put before them, so that `tops` come first."""
    names = list(names)
    if not tops or any(name[0] in tops for name in names):
        return "", ""
    holders = {name[0] for name in names if len(name) > 1 and name[1] in tops}
    if len(holders) == 1:
        return f"{holders.pop()}/", ""
    return "", (f"{stem}/" if stem in tops else "")  # some zips lack the folder that they are named after


def _has_any(folder: Path, tops: Collection[str]) -> bool:
    return any((folder / top).exists() for top in tops)


def _subfolders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if _is_seen(path.name) and path.is_dir()]


def _is_seen(path: str) -> bool:
    """Whether a path is relative, stays within its root, and has no hidden part."""
    parts = path.split("/")
    return all(p and not p.startswith(".") and p != "__MACOSX" for p in parts) and not set(path) & set("\\\0")


def _is_loop(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and Path(entry.path).parent.resolve().is_relative_to(Path(entry.path).resolve())


def _too_large() -> ValueError:
    return ValueError(f"it holds more than {MAX_FILE_BYTES / 2**20:g} MiB; no image or label is that large")
