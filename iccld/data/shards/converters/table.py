"""A data set as one YAML: where images and labels lie, and what the labels mean.

    images: leftImg8bit/{split}/{city}/{frame}_leftImg8bit.png
    labels: gtFine/{split}/{city}/{frame}_gtFine_labelIds.png    # none: a target set
    key: "{frame}"           # default: all placeholders of `images`, joined
    splits: [train, val]     # what --split may be; `any`: any name or none; left out: there are no splits
    labels_as: ids           # how labels are stored (`LabelsAs`)
    ids: {7: 0, 8: 1, 9: 255}

`ids` names everything that may occur in a label file, and its train id (0-18) or 255 where it is not evaluated; with
--classes also the name of a class, or `ignore`. It is the name of a known map, or a map from ids, from names (polygons,
or with `class_list`), or from "r g b" colours; left out, labels are what --classes or --mapping says. `class_list` is a
JSON of the package that names the classes by `labels: [{name: ...}, ...]`, the first being id 0. Where packages differ,
`labels` and `class_list` are lists of one length; what counts is the first whose class list is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iccld.data.classes import ClassList
from iccld.data.shards.converters.pattern import Pattern
from iccld.data.shards.converters.readers import LabelsAs, color_code
from iccld.labels import CITYSCAPES_ID_TO_TRAIN_ID, IGNORE_INDEX
from iccld.plain_yaml import parse_yaml
from iccld.texts import read_text

TRAIN_IDS = (*range(19), IGNORE_INDEX)
KNOWN_IDS: Mapping[str, Mapping[int, int]] = {
    "cityscapes_ids": {i: CITYSCAPES_ID_TO_TRAIN_ID.get(i, IGNORE_INDEX) for i in range(34)},
    "cityscapes_train_ids": {i: i for i in TRAIN_IDS},
}
_MAX_ID = 65535
_RULE_OF_NAMES = "write {id in the labels: name of a class}, or `ignore` for what is not evaluated"
_RULE = "write {old id: train id}, with train ids 0-18, or 255 for what is not evaluated"

Ids = Mapping[Any, int | None]


@dataclass(frozen=True)
class Table:
    """Content of a data set's YAML. `ids` is None if --mapping gives them; `splits` is None for any split or none."""

    path: Path
    images: Pattern
    labels: tuple[Pattern, ...] = ()
    key: Pattern | None = None
    splits: tuple[str, ...] | None = ()
    labels_as: LabelsAs = LabelsAs.ids
    class_list: tuple[str, ...] = ()
    ids: Ids | None = None

    @property
    def name(self) -> str:
        """Return the data set's name."""
        return self.path.stem

    @property
    def by_name(self) -> bool:
        """Tell whether `ids` are class names."""
        return bool(self.class_list) or self.labels_as is LabelsAs.polygons


def read_table(path: Path, *, classes: ClassList | None = None) -> Table:
    """Read and check the table of a YAML file; `classes` say what it leaves open about labels.

    Raises ValueError that says what is wrong in one line.
    """
    setting = f"--dataset {path}"
    content = _load(path, setting)
    known = Table.__dataclass_fields__.keys() - {"path"}
    if unknown := sorted(set(map(str, content)) - known):
        raise ValueError(
            f"{setting}: {', '.join(unknown)} is no key of a data set; there are {', '.join(sorted(known))}."
        )
    if not isinstance(content.get("images"), str):
        raise ValueError(f"{setting}: images is missing; write a pattern, as in images: images/{{frame}}.png.")
    usual = classes.labels_as if classes and "ids" not in content else LabelsAs.ids.value
    labels = _texts(content, "labels", setting)
    if usual == LabelsAs.polygons.value and "labels_as" not in content:
        labels = tuple(f"{text.removesuffix('.png')}.json" if text.endswith(".png") else text for text in labels)
    table = Table(
        path=path,
        images=Pattern(content["images"]),
        labels=tuple(map(Pattern, labels)),
        key=Pattern(str(content["key"])) if "key" in content else None,
        splits=None if content.get("splits") == "any" else _texts(content, "splits", setting),
        labels_as=_labels_as(content.get("labels_as", usual), setting),
        class_list=_texts(content, "class_list", setting),
    )
    _check_patterns(table, setting)
    _check_labels(table, content, setting, is_told=classes is not None)
    if "ids" not in content:
        return table
    return replace(table, ids=parse_ids(content["ids"], table, f"{setting}: ids", classes))


def read_mapping(path: Path, table: Table, classes: ClassList | None = None) -> Ids:
    """Read the ids of a `--mapping` file, YAML or JSON."""
    return parse_ids(_load(path, f"--mapping {path}"), table, f"--mapping {path}", classes)


def ids_of_classes(classes: ClassList, table: Table) -> Ids:
    """Map what a label file may hold to class indices, as the file of classes itself says."""
    if classes.without_ids:
        names = ", ".join(classes.without_ids)
        raise ValueError(f"--classes {classes.path}: {names} without `ids`; add those in the labels ([]: none).")
    return {_old_id(old, table, f"--classes {classes.path}"): new for old, new in classes.ids.items()}


def parse_ids(content: Any, table: Table, setting: str, classes: ClassList | None = None) -> Ids:
    """Map what a label file may hold to train ids, or to indices of `classes`; colours become numbers.

    Only polygons may have None: not drawn.
    """
    ids = _parse_ids(content, table, setting, with_names=classes is not None)
    return {old: classes.index_of(new, f"{setting}: {old}") for old, new in ids.items()} if classes else ids


def _parse_ids(content: Any, table: Table, setting: str, *, with_names: bool) -> Mapping[Any, Any]:
    """Map ids, as they are written, to train ids or to names of one's own classes."""
    if isinstance(content, str):
        if content not in KNOWN_IDS or table.by_name or table.labels_as is LabelsAs.colors:
            raise ValueError(f"{setting}: {content!r} is no known map of such labels; {_RULE}.")
        return KNOWN_IDS[content]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{setting}: there is no mapping; {_RULE}.")
    ids: dict[int | str, Any] = {}
    for old, new in content.items():
        if (known := _old_id(old, table, setting)) in ids:
            raise ValueError(f"{setting}: {old!r} names {known!r} a second time; leave one of them out.")
        ids[known] = new
    allowed = {*TRAIN_IDS, None} if table.labels_as is LabelsAs.polygons else set(TRAIN_IDS)
    strange = [new for new in ids.values() if isinstance(new, bool | float | list | dict) or new not in allowed]
    if with_names:
        strange = [new for new in strange if not isinstance(new, str)]
    if strange:
        rule = _RULE_OF_NAMES if with_names else _RULE
        names = not with_names and any(isinstance(new, str) for new in strange)
        by_file = ", or say by --classes FILE what the names mean" if names else ""
        raise ValueError(f"{setting}: {strange} on the right-hand side; {rule}{by_file}.")
    return ids


def _old_id(old: Any, table: Table, setting: str) -> int | str:
    if table.by_name:
        return str(old)
    try:
        if table.labels_as is LabelsAs.colors:
            return color_code(str(old))
        if isinstance(old, bool | float) or not 0 <= int(old) <= _MAX_ID:
            raise ValueError(f"an id is a number from 0 to {_MAX_ID}")
        return int(old)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{setting}: {old!r} on the left-hand side ({error}); {_RULE}.") from error


def _load(path: Path, setting: str) -> dict[Any, Any]:
    content = parse_yaml(read_text(path, setting), where=setting, aliases=True)  # JSON is YAML
    if not isinstance(content, dict):
        raise ValueError(f"{setting}: there is no mapping; write one `key: value` a line.")
    return content


def _texts(content: Mapping[str, Any], key: str, setting: str) -> tuple[str, ...]:
    value = content.get(key) or []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{setting}: {key}={value!r} must be a text or a list of texts.")
    return tuple(texts)


def _labels_as(value: Any, setting: str) -> LabelsAs:
    names = [kind.value for kind in LabelsAs]
    if value not in names:
        raise ValueError(f"{setting}: labels_as={value} is unknown; use one of {', '.join(names)}.")
    return LabelsAs(value)


def _check_patterns(table: Table, setting: str) -> None:
    keyed = {"key": table.key} if table.key else {}
    others = {"class_list": map(Pattern, table.class_list), "labels": table.labels}
    named = [("images", table.images), *keyed.items(), *((key, p) for key, ps in others.items() for p in ps)]
    for key, pattern in named:
        if not pattern.is_sound():
            rule = (
                "it must be a relative path in which braces enclose one name, as in images/{city}/{frame}.png, with "
                "something between two of them and at most two `*`"
            )
            raise ValueError(f"{setting}: {key}={pattern.text} is no pattern; {rule}.")
        given = () if key == "class_list" else table.images.names
        if unknown := [name for name in pattern.names if name not in given]:
            raise ValueError(
                f"{setting}: {key}={pattern.text}: {unknown[0]} is no placeholder of images; name it there."
            )
    if ("split" in table.images.names) != (table.splits is None or len(table.splits) > 0):
        raise ValueError(
            f"{setting}: images names {{split}} where, and only where, splits lists them; write both or none."
        )


def _check_labels(table: Table, content: Mapping[str, Any], setting: str, *, is_told: bool) -> None:
    meaning = [key for key in ("labels_as", "class_list", "ids") if key in content]
    if not table.labels and meaning:
        raise ValueError(f"{setting}: {meaning[0]} without labels; add a pattern of labels, or leave it out.")
    if (len(table.labels) > 1 or table.class_list) and len(table.labels) != len(table.class_list):
        raise ValueError(
            f"{setting}: {len(table.labels)} labels and {len(table.class_list)} class_list; list one for each."
        )
    if table.class_list and table.labels_as is not LabelsAs.ids:
        raise ValueError(f"{setting}: class_list goes with labels_as: ids, not {table.labels_as.value}; leave one out.")
    needs_ids = table.by_name or table.labels_as in (LabelsAs.colors, LabelsAs.red16)
    if table.labels and not is_told and "ids" not in content and needs_ids:
        raise ValueError(f"{setting}: ids is missing; {_RULE}.")
