"""Reads small files that others may have made: at most so many bytes, of a plain file, as plain data."""

import json
import os
import stat
from pathlib import Path
from typing import Any

MIB = 1 << 20


def read_limited(path: Path, limit: int = MIB) -> bytes:
    """A file's bytes. Raises OSError where it cannot be read, ValueError where it is no file or larger than `limit`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a plain file; remove it, or give another.")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(
            f"{path} has more than {limit:,} bytes, and should be much smaller; it is not what it should be."
        )
    return data


def read_json(path: Path, limit: int = MIB) -> Any:
    """What a JSON file holds. Raises as `read_limited` does, and ValueError where it is not JSON."""
    return parse_json(read_limited(path, limit), str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """Plain data from JSON; raises ValueError, naming `where`, for anything else."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({_short(error)}).") from error


def _short(error: BaseException) -> str:
    text = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
    return text[:300]
