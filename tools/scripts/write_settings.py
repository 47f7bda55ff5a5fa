"""Write docs/settings.md: every setting with its type, its default and the line that explains it in the source.

`python tools/scripts/write_settings.py` writes the page. Explanations are the string below a field, or the comment
behind it.
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
from pathlib import Path
from types import UnionType
from typing import Any

from iccld.config import Config
from iccld.data.config import SetConfig
from iccld.settings import fields_of
from iccld.slurm.config import SubmitConfig

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

OPENING = """\
# Settings

This page is generated from the source: `python tools/scripts/write_settings.py` writes it again.

Change a setting of a run on the command line by `key=value`, as in `iccld train seed=1 ...`.
`iccld config experiment=NAME` prints the settings of an experiment: the YAML files that it names replace some of the
defaults below. Each table belongs to one part of the settings, and the text above it explains the part.
"""

FURTHER_SETS = """\
The parts `data.source`, `data.target` and `data.validation` take further sets by name:
`data.source.also={NAME:{shards:FOLDER}}`. Each has the settings below.
"""

SUBMISSION = """\
These are options of `iccld submit`, as in `iccld submit --gpus-per-node 4`, with `-` in place of `_`. A YAML file that
is given by `--settings` holds them by the names below.
"""


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"{PAGE}: written")


def page() -> str:
    """The text of docs/settings.md."""
    parts = [OPENING]
    for path, part in sections(Config()):
        parts.append(section(f"`{path}`" if path else "The run", part, prefix=f"{path}." if path else ""))
    parts.append(section("Further sets of a domain", SetConfig(), prefix="data.source.also.NAME.", note=FURTHER_SETS))
    parts.append(section("`iccld submit`", SubmitConfig(), prefix="", note=SUBMISSION))
    return "\n".join(parts)


def sections(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and instance of every dataclass of the settings that has settings of its own, outer ones first."""
    if any(not dataclasses.is_dataclass(getattr(part, field.name)) for field in dataclasses.fields(part)):
        yield path, part
    for field in dataclasses.fields(part):
        inner = getattr(part, field.name)
        if dataclasses.is_dataclass(inner):
            yield from sections(inner, f"{path}.{field.name}" if path else field.name)


def section(title: str, part: Any, *, prefix: str, note: str = "") -> str:
    """A heading, the docstring of the dataclass, and a table of its fields."""
    known, types = explanations(type(part)), fields_of(type(part))
    rows = [
        f"| `{prefix}{field.name}` | {type_name(types[field.name])} | {shown(getattr(part, field.name))} "
        f"| {cell(known.get(field.name) or about_choices(types[field.name]))} |"
        for field in dataclasses.fields(part)
        if not dataclasses.is_dataclass(getattr(part, field.name))
    ]
    written = "" if str(type(part).__doc__).startswith(f"{type(part).__name__}(") else inspect.getdoc(type(part)) or ""
    about = textwrap.fill(" ".join(written.split()), 120, break_long_words=False, break_on_hyphens=False)
    table = "\n".join(["| setting | type | default | |", "|---|---|---|---|", *rows])
    return "\n\n".join(text.strip() for text in (f"## {title}", note, about, table) if text) + "\n"


def explanations(schema: type) -> dict[str, str]:
    """What the source says of each field of a dataclass and of those that it inherits from."""
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
    """The first paragraph of an enum's docstring; empty for another type."""
    written = vars(kind).get("__doc__") if isinstance(kind, type) and issubclass(kind, Enum) else None
    return " ".join((written or "").split("\n\n")[0].split())


def type_name(kind: Any) -> str:
    """The type as a reader writes it: the choices of an enum, `list of int`, `text`."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{choice.name}`" for choice in kind)
    if isinstance(kind, UnionType):
        return " or ".join(type_name(one) for one in typing.get_args(kind))
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        return f"list of {type_name(of[0])}"
    if origin is dict:
        return f"dictionary of {type_name(of[0])} to {type_name(of[1])}"
    names = {str: "text", bool: "true or false", SetConfig: "a set", Any: "any value"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def shown(value: Any) -> str:
    """A default as the command line takes it; nothing for an empty text."""
    if isinstance(value, Enum):
        return f"`{value.name}`"
    if isinstance(value, str):
        return f"`{value}`" if value else ""
    plain = (
        [item.name if isinstance(item, Enum) else item for item in value] if isinstance(value, list | tuple) else value
    )
    return f"`{json.dumps(plain).replace(chr(34), '').replace(', ', ',')}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
