"""YAML as plain data: numbers, strings, lists and dicts. Every defect is one line that names file and line.

Nothing in a file leads elsewhere: tags, aliases (a few of which unfold to gigabytes), repeated keys, deep nesting and
files beyond a size are refused, and `${...}` is text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from iccld.reading import read_limited

MAX_BYTES = 1 << 20
MAX_DEPTH = 40
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")} | {"!"}
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
"""Numbers such as 1e-7, which YAML 1.1 takes for a word and Hydra for a number."""


class _Loader(yaml.SafeLoader):
    depth, aliases = 0, False

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and not self.aliases:
            raise yaml.MarkedYAMLError(problem=f"has an alias (*{event.anchor})", problem_mark=event.start_mark)
        tag = getattr(event, "tag", None)
        if tag not in {None, *_PLAIN_TAGS}:
            raise yaml.MarkedYAMLError(problem=f"has a tag ({tag})", problem_mark=event.start_mark)
        if tag in _NUMBERS and ":" in getattr(event, "value", ""):
            raise yaml.MarkedYAMLError(problem="has a number of base 60", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"is nested over {MAX_DEPTH} deep", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            names = {key.value} if key.tag.endswith(":merge") else {key.value, self.construct_object(key)}
            if names & seen:
                raise yaml.MarkedYAMLError(problem=f"names {key.value!r} twice", problem_mark=key.start_mark)
            seen |= names
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if text.isprintable() else '"'  # else line breaks of Unicode become blanks
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
# Days, too, are text, and so are numbers of base 60, such as 1:30, which take a time that grows with their square.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(f"(?!.*:){pattern.pattern}", pattern.flags))
        for tag, pattern in resolvers
        if not tag.endswith(":timestamp")
    ]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


class _OwnLoader(_Loader):
    aliases = True


def read_yaml(path: Path, *, aliases: bool = False) -> Any:
    """Read a file. `aliases` are allowed only in the user's own. Raises ValueError; OSError if it cannot be read."""
    data = read_limited(path, MAX_BYTES)
    try:
        return parse_yaml(data.decode("utf-8-sig"), where=str(path), aliases=aliases)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: is not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8.") from None


def parse_yaml(text: str, *, where: str, aliases: bool = False) -> Any:
    """Parse the text; None if it is empty. Raises ValueError that names `where` and the line."""
    try:
        return yaml.load(text, Loader=_OwnLoader if aliases else _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}{explain(error)}") from error
    except (ValueError, LookupError, ArithmeticError, RecursionError) as error:  # `!!bool maybe`, thousands of digits
        raise ValueError(f"{where}: no YAML that can be read ({' '.join(str(error).split())[:200]}).") from error


def explain(error: yaml.YAMLError) -> str:
    """Return `:LINE: what is wrong`, in one line."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or " ".join(str(error).split())
    context = f" {error.context}" if isinstance(error, yaml.MarkedYAMLError) and error.context else ""
    return f"{f':{mark.line + 1}' if mark else ''}: {what}{context}."


def line_of(path: Path, key: str) -> int:
    """Return the line of a readable file that sets `a.b.c`, or, in a file of a group, `b.c` or `c`; 0 if none does."""
    root, parts = yaml.compose(read_limited(path, MAX_BYTES).decode("utf-8-sig"), Loader=_OwnLoader), key.split(".")
    for first in range(len(parts)):
        node, line = root, 0
        for part in parts[first:]:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            found = [(value, name.start_mark.line + 1) for name, value in pairs if name.value == part]
            node, line = found[0] if found else (None, 0)
        if line:
            return line
    return 0


def to_yaml(values: Any) -> str:
    """Write the text from which `parse_yaml` gives the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)
