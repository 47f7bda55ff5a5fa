"""Reading of each setting in the source: its type, its default and its meaning.

An explanation is the string below a field, or the comment behind it; else the docstring of its enum.
"""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from enum import Enum
from types import UnionType
from typing import Any, NamedTuple

from iccld.schema import fields_of


class Setting(NamedTuple):
    """A setting as people read of it, in Markdown; `default` is empty for an empty text."""

    name: str
    type: str
    default: str
    meaning: str


def settings_in(part: Any) -> Iterator[Setting]:
    """Yield the settings that a dataclass of the settings holds itself, with the defaults of this instance."""
    known, types = explanations(type(part)), fields_of(type(part))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if not dataclasses.is_dataclass(value):
            meaning = known.get(field.name) or about_choices(types[field.name])
            yield Setting(field.name, type_name(types[field.name]), shown(value), meaning)


def about(part: Any) -> str:
    """Return the docstring of a dataclass in one line; empty if it has none of its own."""
    written = type(part).__doc__ or ""
    return "" if written.startswith(f"{type(part).__name__}(") else " ".join(inspect.cleandoc(written).split())


def sections(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and instance of every dataclass that has settings of its own, outer ones first."""
    if any(settings_in(part)):
        yield path, part
    for field in dataclasses.fields(part):
        inner = getattr(part, field.name)
        if dataclasses.is_dataclass(inner):
            yield from sections(inner, f"{path}.{field.name}" if path else field.name)


def explanations(schema: type) -> dict[str, str]:
    """Return what the source says of each field of a dataclass and of those that it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if dataclasses.is_dataclass(owner):
            found |= _own_explanations(owner)
    return found


def _own_explanations(schema: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(schema))
    [declared] = ast.parse(source).body
    assert isinstance(declared, ast.ClassDef)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for statement, following in zip(declared.body, [*declared.body[1:], None], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        below = following.value if isinstance(following, ast.Expr) else None
        if isinstance(below, ast.Constant) and isinstance(below.value, str):
            found[statement.target.id] = " ".join(below.value.split())
        elif (comment := comments.get(statement.end_lineno or 0)) and not comment.startswith("fmt:"):
            found[statement.target.id] = comment
    return found


def about_choices(kind: Any) -> str:
    """Return the first paragraph of an enum's docstring; empty for another type."""
    written = vars(kind).get("__doc__") if isinstance(kind, type) and issubclass(kind, Enum) else None
    return " ".join((written or "").split("\n\n")[0].split())


def type_name(kind: Any) -> str:
    """Name the type as a reader writes it: the choices of an enum, `list of int`, `text`."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{choice.name}`" for choice in kind)
    if isinstance(kind, UnionType):
        return " or ".join(type_name(one) for one in typing.get_args(kind))
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        return f"list of {type_name(of[0])}"
    if origin is dict:
        return f"dictionary of {type_name(of[0])} to {type_name(of[1])}"
    if dataclasses.is_dataclass(kind):
        return "a set"
    names = {str: "text", bool: "true or false", Any: "any value"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def shown(value: Any) -> str:
    """Write a default as the command line takes it; nothing for an empty text."""
    if isinstance(value, str):
        return f"`{value}`" if value else ""
    return f"`{json.dumps(value, default=_plain).replace(chr(34), '').replace(', ', ',')}`"


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else dataclasses.asdict(value)
