"""Reading of small files that others may have made: a limited number of bytes, of a plain file, as plain data."""

import json
import os
import stat
from pathlib import Path
from typing import IO, Any, BinaryIO

from iccld.durable import write_whole

MIB = 1 << 20
GIB = 1 << 30


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read it. Raises OSError if it cannot be read, ValueError if it is no plain file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a plain file; remove it, or give another.")
    return os.fdopen(descriptor, "rb")


def read_limited(path: Path, limit: int = MIB) -> bytes:
    """Read a file. Raises the errors of `open_plain`, and ValueError if it is larger than `limit` bytes."""
    with open_plain(path) as file:
        data = read_bytes(file, limit + 1)
    if len(data) > limit:
        raise ValueError(
            f"{path} has more than {limit:,} bytes, and should be much smaller; it is not what it should be."
        )
    return data


def read_bytes(file: IO[bytes], limit: int) -> bytes:
    """Read at most `limit` bytes of an open file, whose own `read(limit)` would take that much memory at once."""
    data = bytearray()
    while len(data) < limit and (piece := file.read(min(limit - len(data), MIB))):
        data += piece
    return bytes(data)


def read_json(path: Path, limit: int = MIB) -> Any:
    """Read a JSON file. Raises the errors of `read_limited`, and ValueError if it is not JSON."""
    return parse_json(read_limited(path, limit), str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """Parse plain data from JSON. Raises ValueError, which names `where`, for anything else."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({_short(error)}).") from error


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number from 0 to 2^53 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def read_secrets(path: Path) -> list[str]:
    """Read the `key=value` lines of a file that only its owner can read. Raises ValueError if others can too."""
    try:
        lines = read_limited(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--secrets {path}: {error}; save it as UTF-8.") from error
    if path.stat().st_mode & 0o077:
        raise ValueError(f"--secrets {path}: others can read it; `chmod 600 {path}`.")
    words = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if wrong := [number for number, word in enumerate(words, 1) if "=" not in word]:
        raise ValueError(f"--secrets {path}: its setting {wrong[0]} is not key=value.")
    return words


def write_secrets(path: Path, words: list[str]) -> None:
    """Write the file that `read_secrets` reads; nobody else can read it at any time."""
    write_whole(path, "".join(f"{word}\n" for word in words), mode=0o600)


def _short(error: BaseException) -> str:
    text = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
    return text[:300]
