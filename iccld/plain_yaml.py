"""YAML as plain data: numbers, strings, lists and dicts. Every defect is one line that names file and line.

Nothing in a file leads elsewhere: tags, aliases (in a user's own file, those that unfold to much), repeated keys, deep
nesting and files beyond a size are refused, and `${...}` is text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from iccld.reading import read_limited

MAX_BYTES = 1 << 20
MAX_DEPTH = 40
MAX_UNFOLDED = 100_000
"""The most values that a file's aliases may stand for, all together; 100 letters of a text count as one more."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")} | {"!"}
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
"""Numbers such as 1e-7, which YAML 1.1 takes for a word and Hydra for a number."""


class _Loader(yaml.SafeLoader):
    aliases = False

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.depth, self.deepest = 0, 0
        self.num_values, self.num_unfolded = 0, 0  # those so far; those of them that aliases stand for
        self.of_anchor: dict[str, tuple[int, int]] = {}  # values in what an alias stands for, and levels below it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        tag, is_alias = getattr(event, "tag", None), isinstance(event, yaml.AliasEvent)
        before, deepest = self.num_values, self.deepest
        self.depth += 1
        self.deepest = self.depth
        self._count(event)
        for is_wrong, problem in (
            (is_alias and not self.aliases, f"has an alias (*{event.anchor})"),
            (tag not in {None, *_PLAIN_TAGS}, f"has a tag ({tag})"),
            (tag in _NUMBERS and ":" in getattr(event, "value", ""), "has a number of base 60"),
            (self.deepest > MAX_DEPTH, f"is nested over {MAX_DEPTH} deep"),
            (self.num_unfolded > MAX_UNFOLDED, f"has aliases that stand for over {MAX_UNFOLDED:,} values"),
        ):
            if is_wrong:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        if event.anchor and not is_alias:
            self.of_anchor[event.anchor] = self.num_values - before, self.deepest - self.depth
        self.depth -= 1
        self.deepest = max(deepest, self.deepest)
        return node

    def _count(self, event: Any) -> None:
        """Count the value that begins, or what an alias stands for: without end, if it is a part of that."""
        if not isinstance(event, yaml.AliasEvent):
            self.num_values += 1 + len(getattr(event, "value", "")) // 100
        elif event.anchor in self.anchors:  # else it stands for nothing, which is refused
            size, levels = self.of_anchor.get(event.anchor, (MAX_UNFOLDED + 1, 0))
            self.num_values += size
            self.num_unfolded += size
            self.deepest += levels

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
