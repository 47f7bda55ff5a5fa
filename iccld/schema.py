"""Words `key=value`: the settings of a schema that they name, and their text to the letter.

The text after the first `=` of a setting that is a string is its value, whatever it holds. Other settings (numbers,
lists, choices) and groups are written in Hydra's grammar.
"""

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

_SETTING = re.compile(r"(\+{0,2})([A-Za-z_$][\w$-]*(?:\.[\w$-]+)*)=(.*)", re.DOTALL)
_NO_SCALAR = (Mapping, list, type(None))


@functools.cache
def fields_of(schema: type) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields."""
    return typing.get_type_hints(schema)


def type_at(schema: Any, key: str) -> Any:
    """Return the type of the setting `a.b.c` of a schema; None if there is none."""
    for part in key.split("."):
        if dataclasses.is_dataclass(schema):
            schema = fields_of(schema).get(part)  # type: ignore[arg-type]
        elif typing.get_origin(schema) in (dict, list):
            schema = typing.get_args(schema)[-1]
        else:
            return None
    return schema


def string_setting(word: str, schema: Any) -> tuple[str, str, str] | None:
    """Divide a word that sets a string into `+` signs, key and value; None for other words. Raises ValueError."""
    found = _SETTING.fullmatch(word)
    if found is None or type_at(schema, found[2]) is not str:
        return None
    check_text(found[3], where=found[2])
    return found[1], found[2], found[3]


def key_of(setting: str) -> str:
    """Return the name of a setting `key=value`, without Hydra's signs."""
    return setting.partition("=")[0].lstrip("+~")


def check_text(value: str, *, where: str) -> None:
    """Refuse what a settings file cannot hold. Raises ValueError."""
    if value == "???":
        raise ValueError(f"{where}=???: a setting of this text is one that is missing, to Hydra; use another.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}={value!r} is not UTF-8; rename it, or set LC_ALL to a UTF-8 locale.") from None


def not_strings(value: Any, schema: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield key and value of everything in a list or dict for `schema` that should be a string and is none."""
    if schema is str and not isinstance(value, str):
        yield key, value
    elif dataclasses.is_dataclass(schema) and isinstance(value, Mapping):
        for name, item in value.items():
            yield from not_strings(item, fields_of(schema).get(name), f"{key}.{name}")  # type: ignore[arg-type]
    elif typing.get_origin(schema) is dict and isinstance(value, Mapping):
        for name, item in value.items():
            yield from not_strings(item, typing.get_args(schema)[1], f"{key}.{name}")
    elif typing.get_origin(schema) is list and isinstance(value, list):
        for item in value:
            yield from not_strings(item, typing.get_args(schema)[0], key)


def unknown_keys(values: Mapping[str, Any], schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys that a schema does not have."""
    for key, value in values.items():
        part = type_at(schema, str(key))
        if part is None:
            yield f"{prefix}{key}"
        elif dataclasses.is_dataclass(part) and isinstance(value, Mapping):
            yield from unknown_keys(value, part, f"{prefix}{key}.")


def misplaced(value: Any, schema: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield key and value of every list, dict or nothing where the schema has another of these, or missing."""
    kind = dict if dataclasses.is_dataclass(schema) else typing.get_origin(schema)
    if kind is dict and isinstance(value, Mapping):
        for name, item in value.items():
            part = type_at(schema, str(name))
            yield from misplaced(item, part, f"{key}.{name}" if key else str(name)) if part is not None else ()
    elif kind is list and isinstance(value, list):
        for item in value:
            yield from misplaced(item, typing.get_args(schema)[0], key)
    elif value == "???" or (schema is not Any and (kind in (dict, list) or isinstance(value, _NO_SCALAR))):
        yield key, value


def with_typed_keys(value: Any, schema: Any) -> Any:
    """Turn JSON's keys, which are strings, into numbers where the schema has numbers."""
    if not isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(schema):
        return {k: with_typed_keys(v, fields_of(schema).get(k)) for k, v in value.items()}  # type: ignore[arg-type]
    of_key, of_value = typing.get_args(schema) if typing.get_origin(schema) is dict else (None, None)
    return {_key(k) if of_key is int else k: with_typed_keys(v, of_value) for k, v in value.items()}


def values_when_absent(section: type) -> dict[str, Any]:
    """Return, by field, what earlier versions meant that wrote none: `when_absent` in the metadata."""
    return {f.name: f.metadata["when_absent"] for f in dataclasses.fields(section) if "when_absent" in f.metadata}


def with_values_when_absent(values: Mapping[str, Any], section: type) -> dict[str, Any]:
    """Add to saved values what earlier versions meant and did not write. A missing section stays missing."""
    found: dict[str, Any] = values_when_absent(section)
    for name, value in values.items():
        part = fields_of(section).get(name)
        is_section = dataclasses.is_dataclass(part) and isinstance(value, Mapping)
        found[name] = with_values_when_absent(value, part) if is_section else value  # type: ignore[arg-type]
    return found


def _key(key: Any) -> Any:
    return int(key) if isinstance(key, str) and re.fullmatch(r"-?\d{1,9}", key) else key


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to `{"a.b.c": value}`; an empty mapping stays a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
