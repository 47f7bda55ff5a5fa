"""Option `--settings`: the settings of an allocation as YAML, each value of its setting's type."""

from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from iccld import plain_yaml
from iccld.slurm.config import SETTINGS, SubmitConfig

_DEFAULTS = {setting.name: setting.default for setting in fields(SubmitConfig)} | {"engine": ""}


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings by name. Raises ValueError for a value that no setting takes, in one line."""
    loaded = plain_yaml.read_yaml(path, aliases=True) or {}
    unknown = sorted(map(str, loaded.keys() - _DEFAULTS)) if isinstance(loaded, dict) else ["no settings"]
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown)}; known are {', '.join((*SETTINGS, 'engine'))}.")
    return {name: _typed(f"{path}: {name}={value!r}", name, value) for name, value in loaded.items()}


def _typed(given: str, name: str, value: Any) -> Any:
    default = _DEFAULTS[name]
    if isinstance(default, Enum):
        choices = [str(choice.value) for choice in type(default)]
        if value not in choices:
            raise ValueError(f"{given} must be one of {', '.join(choices)}.")
        return type(default)(value)
    if isinstance(default, bool):
        return _of_type(value, bool, f"{given} must be true or false, without quotes.")
    if isinstance(default, int):
        return _of_type(value, int, f"{given} must be a whole number, without quotes.")
    if isinstance(default, tuple):
        values = value if isinstance(value, list) else [value]
        return tuple(_word(one, f"{given} must be a list of words, as in [a, b].") for one in values)
    # YAML reads an unquoted 0123 as 83.
    example = ', as in time: "90"' if name == "time" else ""
    return _of_type(value, str, f"{given} must be quoted{example}.")


def _of_type(value: Any, kind: type, message: str) -> Any:
    if type(value) is not kind:
        raise ValueError(message)
    return value


def _word(value: Any, message: str) -> str:
    return str(value) if type(value) is int else _of_type(value, str, message)
