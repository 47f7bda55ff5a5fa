"""Text files that a user gives (keys, mappings, tables, settings), and what messages show of them."""

import codecs
from pathlib import Path
from typing import Any

from iccld.reading import MIB, read_limited

MAX_BYTES = 1024 * MIB  # enough for a list of keys

_MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path, where: str) -> str:
    """Read a text by its byte-order mark, else as UTF-8; every line ends with a plain newline.

    Raises ValueError, which begins with `where`, if it is no file or in another encoding.
    """
    if not path.is_file():
        raise ValueError(f"{where}: there is no such file; give the path of a text file.")
    data = read_limited(path, MAX_BYTES)
    marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "")
    try:
        text = data.decode(marked or "UTF-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"it is broken {marked}" if marked else f"line {line} is no UTF-8 ({_guess(data)})"
        raise ValueError(f"{where}: {what}; save it as UTF-8.") from error
    if "\0" in text:
        raise ValueError(f"{where}: it holds zero bytes ({_guess(data)}); save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def short(value: Any) -> str:
    """Write a value for a message, in 80 characters or so: a file may hold a longer one."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def shown(text: str) -> str:
    """Return a text that anyone may have written in one line, with a terminal's commands spelled out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _guess(data: bytes) -> str:
    return "UTF-16 without a byte-order mark?" if b"\0" in data else "Latin-1 or Windows-1252?"
