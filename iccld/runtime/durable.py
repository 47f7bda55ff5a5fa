"""Small files that a crash leaves whole, and checksums of large ones."""

import hashlib
import os
from pathlib import Path

from iccld.outcome import naming


def write_text_durably(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old one or the new one."""
    scratch = path.with_name(path.name + ".tmp")
    with naming(path, "the file"):
        scratch.write_text(text)
        sync(scratch)
        scratch.replace(path)
        sync(path.parent)


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
