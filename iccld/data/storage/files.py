"""Kinds of files, found out and opened without ever waiting for a FIFO or device."""

import os
import stat
from io import BufferedReader, FileIO
from pathlib import Path

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link to nothing",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(path: Path) -> str:
    """Name the kind of what is at a path, links followed: "a file", "a folder", "a link to nothing", "a FIFO", ..."""
    try:
        return _KINDS[stat.S_IFMT(path.stat().st_mode)]
    except OSError:  # of a link: to nothing, or in a circle
        return _KINDS[stat.S_IFMT(path.lstat().st_mode)]


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading. Raises OSError, and ValueError for a FIFO or device, without waiting for it."""
    if (kind := kind_of(path)) != "a file":
        raise ValueError(f"it is {kind}, no file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return BufferedReader(FileIO(descriptor))


_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z x"),
    b"Rar!": ("RAR", "unrar x"),
}


def packed_by(head: bytes) -> tuple[str, str]:
    """Return the packer of a file that begins with `head`, and the command that unpacks it; ("", "") if unknown."""
    return next((names for magic, names in _PACKED.items() if head.startswith(magic)), ("", ""))
