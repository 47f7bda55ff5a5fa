"""Classes of one's own in one YAML: names, the ids in one's label files, colours, which are rare, which are things.

    classes:                         # in the order of the class indices, at most 254
      floor: {ids: 1, color: [138, 109, 59]}
      shelf: {ids: [2, 7], color: "#cd853f"}
      robot: {ids: 3, rare: true, thing: true, cityscapes: [car, truck]}
    ignore: [0]                      # ids that are not evaluated, like 255, unless a class takes it
    labels_as: ids                   # or red16, colors, polygons: how labels are stored

`ids` are numbers, or, by `labels_as`, colours (default: the class's `color`) or names of polygons (default: the class's
name). A class without a `color` is given one. `cityscapes` names the Cityscapes classes that become this one in data
sets whose labels are known by these. Classes that are `rare` are drawn as often as the rarest.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from iccld.labels import CITYSCAPES_NAMES, IGNORE_INDEX, MAX_CLASSES, ClassSet, is_color, own_class_set
from iccld.plain_yaml import line_of, read_yaml

MAX_ID = 65535
CITYSCAPES = "cityscapes"
"""Word that replaces a file: labels hold Cityscapes train ids."""
_KINDS = ("ids", "red16", "colors", "polygons")
_KEYS = ("classes", "ignore", "labels_as")
_CLASS_KEYS = ("ids", "color", "rare", "thing", "cityscapes")
_MAX_NAME = 100


@dataclass(frozen=True)
class ClassList:
    """Content of a YAML of classes; `ids` maps what label files hold (numbers, "r g b", names) to class indices."""

    path: str
    class_set: ClassSet
    labels_as: str = "ids"
    ids: Mapping[int | str, int] = field(default_factory=dict)
    of_cityscapes: Mapping[int, int] = field(default_factory=dict)
    without_ids: tuple[str, ...] = ()

    @cached_property
    def plain(self) -> dict[str, Any]:
        """Return the arguments of `own_class_set`; JSON holds them all."""
        own = self.class_set
        marked = {"rare": [own.names[c] for c in own.rare], "things": [own.names[c] for c in own.things]}
        return {"names": list(own.names), "colors": [list(color) for color in own.palette], **marked}

    def index_of(self, value: Any, where: str) -> int | None:
        """The class index of a class's name, of 255 or "ignore", of a Cityscapes train id; None stays None.

        Raises ValueError, beginning with `where`.
        """
        if value is None or value == IGNORE_INDEX or value == "ignore":
            return None if value is None else IGNORE_INDEX
        if isinstance(value, str) and value in self.class_set.names:
            return self.class_set.names.index(value)
        if type(value) is int and 0 <= value < len(CITYSCAPES_NAMES) and self.of_cityscapes:
            return self.of_cityscapes.get(value, IGNORE_INDEX)
        if type(value) is int:
            raise ValueError(
                f"{where}: {value} is a Cityscapes train id, and no class of {self.path} says which of them it takes; "
                f"add `cityscapes: [car, ...]` to the classes, or give --mapping with their names."
            )
        raise ValueError(f"{where}: {value!r} is no class of {self.path}{_nearest(value, self.class_set.names)}.")


def read_classes(path: str | Path) -> ClassList:
    """Read and check the classes of a YAML file. Raises ValueError with file, line and reason, in one line."""
    try:
        content = read_yaml(Path(path))
    except OSError as error:
        raise ValueError(f"{path}: the file of classes cannot be read ({error.strerror}); give its path.") from error
    reader = _Reader(Path(path))
    reader.check(isinstance(content, dict) and isinstance(content.get("classes"), dict), "", _EXAMPLE)
    reader.check_keys(content, _KEYS, "")
    labels_as, classes = content.get("labels_as", "ids"), content["classes"]
    reader.check(labels_as in _KINDS, "labels_as", f"labels_as={labels_as} is none of {', '.join(_KINDS)}")
    reader.check_count(classes)
    for name, about in classes.items():
        reader.check_class(name, about)
    colors = reader.colors(classes)
    ids = reader.ids(classes, content.get("ignore"), labels_as)
    of_cityscapes = reader.of_cityscapes(classes)
    marked = [[name for name, about in classes.items() if about.get(key)] for key in ("rare", "thing")]
    class_set = own_class_set(list(classes), colors, rare=marked[0], things=marked[1])
    without_ids = tuple(name for name in classes if _ids_of(name, classes, labels_as) is None)
    return ClassList(str(path), class_set, labels_as, ids, of_cityscapes, without_ids)


def classes_of(setting: str) -> ClassList | None:
    """Read the value of `--classes`: a file's classes; None for nothing and for "cityscapes". Raises ValueError."""
    return read_classes(setting) if setting not in ("", CITYSCAPES) else None


def num_classes_of(classes: ClassList | None) -> int:
    """Count the ids that the labels of a set may hold: those of its own classes, or Cityscapes' 19."""
    return classes.class_set.num_classes if classes else len(CITYSCAPES_NAMES)


_EXAMPLE = "`classes:` is missing; write one line a class, as in `floor: {ids: 1, color: [138, 109, 59]}`"


class _Reader:
    """Checks the parts of a YAML file; an error names the file and the line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, holds: bool, key: str, what: str) -> None:
        """Raise ValueError with the line of the setting `key`, unless `holds`."""
        if not holds:
            line = line_of(self.path, key) if key else 0
            raise ValueError(f"{self.path}{f':{line}' if line else ''}: {what}.")

    def check_keys(self, content: Mapping[Any, Any], known: Sequence[str], prefix: str) -> None:
        for key in content:
            self.check(key in known, f"{prefix}{key}", f"{prefix}{key} is no key{_nearest(key, known)}")

    def check_count(self, classes: Mapping[Any, Any]) -> None:
        rule = f"classes: {len(classes)} of them; there must be 2 to {MAX_CLASSES}"
        self.check(2 <= len(classes) <= MAX_CLASSES, "classes", rule)

    def check_class(self, name: Any, about: Any) -> None:
        key = f"classes.{name}"
        short = isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= _MAX_NAME
        rule = f"a class is a name of 1 to {_MAX_NAME} letters; put numbers and yes/no into quotes"
        self.check(short and name not in ("ignore",), key, f"{key}: {rule}")
        self.check(isinstance(about, dict), key, f"{key} must be as in `{name}: {{ids: 1, color: [138, 109, 59]}}`")
        self.check_keys(about, _CLASS_KEYS, f"{key}.")
        for flag in ("rare", "thing"):
            value = about.get(flag, False)
            self.check(isinstance(value, bool), f"{key}.{flag}", f"{key}.{flag}={value} must be true or false")

    def colors(self, classes: Mapping[str, Any]) -> list[list[int]]:
        """Return the colour of each class; a class without one takes the first free colour of the PASCAL VOC map."""
        given = {
            name: self._color(about["color"], f"classes.{name}") for name, about in classes.items() if "color" in about
        }
        owners: dict[tuple[int, ...], str] = {}
        for name, color in given.items():
            other = owners.setdefault(tuple(color), name)
            rule = f"classes.{name}.color={color} is that of {other}; give each class a colour of its own"
            self.check(other == name, f"classes.{name}", rule)
        free = (color for color in map(voc_color, range(1, 1024)) if tuple(color) not in owners)
        return [given[name] if name in given else next(free) for name in classes]

    def _color(self, value: Any, key: str) -> list[int]:
        if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
            return list(bytes.fromhex(value[1:]))
        self.check(is_color(value), key, f'{key}: color={value} must be [red, green, blue] of 0-255, or "#rrggbb"')
        return [int(part) for part in value]

    def ids(self, classes: Mapping[str, Any], ignore: Any, kind: str) -> dict[int | str, int]:
        """Map what label files may hold to class indices. Raises ValueError if a label belongs to two classes."""
        found: dict[int | str, int] = {}
        owners: dict[int | str, str] = {}
        listed = [(f"classes.{name}", index, _ids_of(name, classes, kind)) for index, name in enumerate(classes)]
        for key, index, value in [*listed, ("ignore", IGNORE_INDEX, ignore)]:
            for item in self._items(value, kind, key):
                other = owners.setdefault(item, key)
                rule = f"{key}: id {item} is that of {other}; an id belongs to one class"
                self.check(other == key and item not in found, key, rule if other != key else f"{key}: id {item} twice")
                found[item] = index
        if kind in ("ids", "red16"):
            found.setdefault(IGNORE_INDEX, IGNORE_INDEX)
        return found

    def _items(self, value: Any, kind: str, key: str) -> Iterator[Any]:
        """Yield the ids of a setting, which is one id or a list of several."""
        several = isinstance(value, list) and not (kind == "colors" and is_color(value))
        for item in value if several else [] if value is None else [value]:
            if kind == "colors":
                yield " ".join(map(str, self._color(item, f"{key}")))
            elif kind == "polygons":
                self.check(
                    isinstance(item, str), key, f"{key}: id {item} must be the name of polygons; put it in quotes"
                )
                yield item
            else:
                sound = type(item) is int and 0 <= item <= MAX_ID
                self.check(sound, key, f"{key}: id {item} must be a number from 0 to {MAX_ID}")
                yield item

    def of_cityscapes(self, classes: Mapping[str, Any]) -> dict[int, int]:
        """Return the class index that each Cityscapes train id becomes."""
        found: dict[int, int] = {}
        for index, (name, about) in enumerate(classes.items()):
            key, value = f"classes.{name}.cityscapes", about.get("cityscapes", [])
            for item in value if isinstance(value, list) else [value]:
                rule = f"{key}: {item!r} is no class of Cityscapes{_nearest(item, CITYSCAPES_NAMES)}"
                self.check(item in CITYSCAPES_NAMES, key, rule)
                train_id = CITYSCAPES_NAMES.index(item)
                self.check(train_id not in found, key, f"{key}: {item!r} becomes two classes; name it once")
                found[train_id] = index
        return found


def _ids_of(name: str, classes: Mapping[str, Any], kind: str) -> Any:
    """Return a class's `ids`, given or by default; None if there is neither."""
    about = classes[name]
    return about.get("ids", {"colors": about.get("color"), "polygons": name}.get(kind))


def voc_color(index: int) -> list[int]:
    """Return colour `index` of PASCAL VOC's map: the index's bits, spread over the channels, so neighbours differ."""
    color = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            color[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
    return color


def proposed_yaml(shares: Mapping[int | str, float], *, labels_as: str) -> str:
    """Write a YAML with a class for each id, or "r g b" colour, that labels were found to hold.

    The user gives the names. A comment tells each id's share of the pixels.
    """
    found: list[tuple[Any, float]] = [pair for pair in shares.items() if pair[0] != IGNORE_INDEX]
    ignored = [pair for pair in shares.items() if pair[0] == IGNORE_INDEX]
    if len(found) < 2:  # as in masks of 0 and 255
        found, ignored = found + ignored, []
    lines = ["classes:  # give them names; move ids that are not evaluated to `ignore`"]
    for number, (item, share) in enumerate(sorted(found), 1):
        color = item.split() if isinstance(item, str) else voc_color(number)
        ids = "" if labels_as == "colors" else f"ids: {item}, "
        lines.append(f"  class_{number}: {{{ids}color: [{', '.join(map(str, color))}]}}  # {share:.2%} of the pixels")
    if len(found) < 2:
        lines.append("  class_2: {ids: []}  # no label that was read shows another id; two classes are the least")
    ids = "".join(f"[{item}]  # {share:.2%} of the pixels; make it a class if it is one" for item, share in ignored)
    return "\n".join([*lines, f"ignore: {ids or '[]'}", f"labels_as: {labels_as}"])


def _nearest(value: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known[:20])}"
