"""YAML groups of the user's own (`--config-dir`), read for Hydra as plain data: a defect has file and line."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from iccld import plain_yaml
from iccld.reading import read_limited
from iccld.schema import not_strings, type_at

PACKAGED = Path(__file__).parent / "configs"


def own_files(folder: Path, choices: Iterable[tuple[str, Any]]) -> list[Path]:
    """Return the files of a folder that groups and their choices name."""
    names = [(group, name) for group, given in choices for name in (given if isinstance(given, list) else [given])]
    files = [folder / group / re.sub(r"(\.ya?ml)?$", ".yaml", str(name), count=1) for group, name in names]
    return [file for file in files if file.is_file()]


def refuse_packaged_names(folder: Path) -> None:
    """Raise ValueError for a file that has the name of a packaged one, which Hydra would take instead."""
    for packaged in sorted(PACKAGED.glob("*/*.yaml")):
        name = packaged.relative_to(PACKAGED)
        if (folder / name).is_file():
            raise ValueError(f"{folder / name}: the packaged {name} would be taken; give the file another name.")


def read_group_file(path: Path, schema: type) -> tuple[Mapping[str, Any], str]:
    """Return a file's values, and its text.

    Raises ValueError if it holds something else than settings, or a number where the schema has a text.
    """
    values = plain_yaml.read_yaml(path, aliases=True)
    if values is None:  # empty, or comments
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}:1: holds no settings; write `key: value` lines.")
    text = read_limited(path).decode()
    if text.startswith("\ufeff"):
        raise ValueError(f"{path}:1: begins with a byte-order mark, which hides its first line; save it without.")
    package = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    part = schema if package and package[1] == "_global_" else type_at(schema, package[1] if package else "")
    for key, value in not_strings(values, part, package[1] if package else ""):
        line = plain_yaml.line_of(path, key)
        raise ValueError(f"{path}:{line}: {key.rpartition('.')[2]}: {value} must be text; put it into quotes.")
    return values, text


def place_of(message: str, folder: Path, files: Iterable[Path]) -> str:
    """Return `FILE:LINE: ` of the user's file that Hydra's message is about; "" if it is about none."""
    if named := re.search(r"In '([^']+)'", message):
        files = [path for path in [folder / f"{named[1]}.yaml"] if path.is_file()]
    key = re.search(r"full_key: (\S+)", message)
    for path in files:
        line = plain_yaml.line_of(path, key[1]) if key else 0
        if line or named:
            return f"{path}:{line or 1}: "
    return ""


def remedy_of(message: str, file: str) -> str:
    """Say what to do if Hydra takes a file's settings for those of a part that does not exist."""
    key = re.search(r"Key '([^']+)' not in 'Config'", message)
    if key and Path(file.split(":")[0]).parent.name == key[1]:
        return "; begin the file with the line `# @package data` (or the part that it sets, or _global_)"
    return ""
