"""A data set's files as its table describes them: the pairs, and the train ids of a label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from iccld.data.classes import ClassList, num_classes_of
from iccld.data.shards.converters.pairing import Pair, pair_labels, repeated, without_labels
from iccld.data.shards.converters.pattern import Pattern, has_image_ending, is_readable
from iccld.data.shards.converters.readers import (
    LabelsAs,
    class_list_ids,
    count_not_drawn,
    read_colors,
    read_ids,
    read_polygons,
    read_red16,
)
from iccld.data.shards.converters.table import KNOWN_IDS, Ids, Table, ids_of_classes, read_mapping, read_table
from iccld.data.shards.converters.tree import InputTree, NotSeen, fold
from iccld.data.shards.tally import Tally, plain
from iccld.data.shards.tars import LEAVE_OUT, Problem

_TABLES = Path(__file__).parent / "tables"
DATASETS = tuple(sorted(path.stem for path in _TABLES.glob("*.yaml")))
"""The packaged data sets."""

_READERS: Mapping[LabelsAs, Any] = {
    LabelsAs.ids: read_ids,
    LabelsAs.red16: read_red16,
    LabelsAs.colors: read_colors,
    LabelsAs.polygons: read_polygons,
}


@dataclass(frozen=True)
class Survey:
    """Content of an input: the pairs, sorted by image; lost images; labels without an image, sorted; and the rest."""

    pairs: list[Pair]
    problems: list[Problem]
    spare_labels: list[str]
    passed_over: Tally


class Converter:
    """One data set's files, by its table. It can be pickled and used from several processes."""

    def __init__(
        self, table: Table, root: Path, *, split: str = "", ids: Ids | None = None, classes: ClassList | None = None
    ) -> None:
        self.name, self.table, self.split, self.classes = table.name, table, split, classes
        self.num_classes = num_classes_of(classes)
        self.is_told = bool(ids or table.ids or not table.labels)
        """Tell whether anything says what the labels mean; else, they are taken for train ids."""
        self.ids: Ids = ids or table.ids or KNOWN_IDS["cityscapes_train_ids"]
        patterns = [pattern.with_split(split) for pattern in (table.images, *table.labels)]
        tops = [pattern.top for pattern in patterns] + [Pattern(path).top for path in table.class_list]
        self.tree = InputTree(root, tops=tops if all(tops) else ())
        there = [self.tree.exists(path) for path in table.class_list]
        chosen = there.index(True) if any(there) else 0
        self._images, self._labels = patterns[0], patterns[1 + chosen] if table.labels else None
        self.class_list = table.class_list[chosen] if table.class_list else ""

    def survey(self, *, with_labels: bool = True) -> Survey:
        """Look at all files in the folders of images and labels. Raises ValueError if there are no pairs."""
        not_seen, labels = NotSeen(), self._labels if with_labels else None
        images = self.tree.files(self._images.folder, not_seen=not_seen)
        found = [(path, self._images.match(path)) for path in images]
        fitting = [self._pair(path, values) for path, values in found if values is not None]
        pairs = without_labels(fitting, own_too=with_labels)
        others = [path for path, values in found if values is None]
        unread = [path for path in others if self._is_unread_image(path)]
        if not pairs:
            raise ValueError(self._no_pairs(unread))
        if not with_labels:  # else they are used, or belong to no image
            for path in sorted({pair.image for pair in fitting} - {pair.image for pair in pairs}):
                not_seen.passed_over.add("files are labels of other images by their names", path)
        label_files = self._label_files(labels, images, not_seen) if labels else []
        pairs = pair_labels(pairs, label_files) if labels else pairs
        if pairs[0].label and self.tree.exists(pairs[0].label):
            _ = self._train_ids  # a class list that does not fit is one error, not one a label
        used = {path for pair in pairs for path in (pair.image, pair.label)}.union(unread)
        spare = [path for path in label_files if path not in used and labels and labels.match(path)]
        pairs = self._each_once(pairs, not_seen, with_labels=with_labels)
        for path in sorted({*others, *label_files} - used - set(spare)):
            _, dot, ending = path.rpartition("/")[2].rpartition(".")
            not_seen.passed_over.add(f"files are not used: {plain(dot + ending) if dot else 'without ending'}", path)
        problems = [
            Problem(place, what, f"put the file itself there, {LEAVE_OUT}") for place, what in sorted(not_seen.lost)
        ]
        for path in unread:
            what, remedy = self._why_unread(path)
            problems.append(Problem(self.tree.location(path), what, f"{remedy}, {LEAVE_OUT}"))
        return Survey(pairs, problems, spare, not_seen.passed_over)

    def _each_once(self, pairs: Sequence[Pair], not_seen: NotSeen, *, with_labels: bool) -> list[Pair]:
        """Leave out the pairs that a linked folder shows again; count them, and what zips add to a folder's files."""
        paths = {path for pair in pairs for path in (pair.image, pair.label if with_labels else None) if path}
        for path, name in sorted(self.tree.added_by_zips(paths)):
            beside = f"come from {name} beside the folder's own (move it away if it is no part of the set)"
            not_seen.passed_over.add(f"images and labels {beside}" if with_labels else f"images {beside}", path)
        left_out = {pair.image for pair in repeated(pairs, self.tree.real(paths))} if not_seen.has_links else set()
        for path in sorted(left_out):
            location = self.tree.location(path)
            not_seen.passed_over.add("images are not used again: linked folders show them twice", location)
        return [pair for pair in pairs if pair.image not in left_out]

    def pairs(self) -> list[Pair]:
        """Return all pairs of the split, sorted by the image's path. Raises ValueError if there are none."""
        return self.survey().pairs

    def _label_files(self, labels: Pattern, images: Sequence[str], not_seen: NotSeen) -> list[str]:
        """Return the files in the folders of labels, which may be those of images too."""
        inside = fold(f"{labels.folder}/") if labels.folder else ""
        if inside.startswith(fold(f"{self._images.folder}/") if self._images.folder else ""):
            return [path for path in images if fold(path).startswith(inside)]
        return self.tree.files(labels.folder, not_seen=not_seen)

    def _is_unread_image(self, path: str) -> bool:
        return (
            has_image_ending(path)
            and self._images.matches_but_for_ending(path)
            and not (self._labels and self._labels.match(path))
        )

    def _why_unread(self, path: str) -> tuple[str, str]:
        """Say why an image that lies where the layout has images is none of the set, and what to do."""
        if not is_readable(path):
            return "images of its format are not read", "convert it to PNG or JPEG"
        wanted, ending = (text.rpartition(".")[2] for text in (self._images.text, path))
        remedy = f"copy {self.table.path}, write .{{suffix}} for .{wanted} in `images:`, give the copy as --dataset"
        return f"it ends in .{ending}, and the layout's images in .{wanted}", remedy

    def _no_pairs(self, unread: Sequence[str]) -> str:
        where = f"{self.tree.root} (--split {self.split})" if self.split else self.tree.root
        more = ""
        if unread := [path for path in unread if is_readable(path)] or unread:
            what, remedy = self._why_unread(unread[0])
            more = f"; {len(unread)} images are not read, such as {plain(unread[0])} ({what}): {remedy}"
        return f"--input {where} holds no images of {self.name}, which lie as {self._layout()}{more}."

    def train_ids(self, path: str, data: bytes | None = None) -> np.ndarray:
        """Return the `(H, W)` uint8 train ids of a label file, whose `data` may have been read already.

        Raises UnknownIds or one of DECODE_ERRORS.
        """
        return _READERS[self.table.labels_as](self.tree.read(path) if data is None else data, self._train_ids)

    def count_not_drawn(self, data: bytes) -> int:
        """Count the outlines in a label file that have too few points to be drawn."""
        return count_not_drawn(data) if self.table.labels_as is LabelsAs.polygons else 0

    def describe(self) -> dict[str, Any]:
        """Return everything that the pairs and the labels' meaning depend on, as JSON."""
        own = {"classes": self.classes.plain["names"]} if self.classes else {}
        return own | {
            "images": self._images.text,
            "labels": self._labels.text if self._labels else None,
            "key": self._key.text,
            "labels_as": self.table.labels_as.value,
            "class_list": self.class_list,
            "ids": {str(old): new for old, new in sorted(self.ids.items())},
        }

    @property
    def _key(self) -> Pattern:
        names = [name for name in self._images.names if name != "suffix"]
        return self.table.key or Pattern("/".join(f"{{{name}}}" for name in names))

    def _pair(self, image: str, values: dict[str, str]) -> Pair:
        values = values | {"split": self.split}
        return Pair(self._key.fill(values), image, self._labels.fill(values) if self._labels else None)

    def _layout(self) -> str:
        return self._images.text + (f", and labels as {self._labels.text}" if self._labels else "")

    @cached_property
    def _train_ids(self) -> Ids:
        """Map what a label file may hold to train ids."""
        if not self.class_list:
            return self.ids
        location = self.tree.location(self.class_list)
        if not self.tree.exists(self.class_list):
            raise ValueError(f"{location} is missing; {self.name} needs it to tell what its label ids mean")
        try:
            return class_list_ids(self.tree.read(self.class_list), self.ids)
        except ValueError as error:
            raise ValueError(f"{location}: {error}; use the data set of its version") from error


def open_converter(
    dataset: str, root: Path, *, split: str = "", mapping: Path | None = None, classes: ClassList | None = None
) -> Converter:
    """Open the converter of a packaged data set, or of the table at the path `dataset`, over the files in `root`.

    With `classes`, labels become their indices; else Cityscapes train ids. Raises ValueError if a setting is wrong.
    """
    if dataset in DATASETS:
        table = read_table(_TABLES / f"{dataset}.yaml", classes=classes)
    elif dataset.endswith((".yaml", ".yml")):
        table = read_table(Path(dataset), classes=classes)
    else:
        packaged = ", ".join(DATASETS)
        raise ValueError(f"--dataset {dataset} is unknown; use one of {packaged}, or the path of a YAML of your own.")
    _check_split(table, split)
    if mapping is None:
        ids = ids_of_classes(classes, table) if classes and table.labels and table.ids is None else None
        return Converter(table, root, split=split, ids=ids, classes=classes)
    if table.ids is not None or not table.labels:
        raise ValueError(f"--mapping {mapping}: the ids of {table.name} are known; leave --mapping out.")
    return Converter(table, root, split=split, ids=read_mapping(mapping, table, classes), classes=classes)


def _check_split(table: Table, split: str) -> None:
    if split and (not Pattern(split).is_sound() or Pattern(split).names):
        raise ValueError(f"--split {split} must be the name of a folder in --input.")
    if table.splits is None:
        within = [pattern.text for pattern in (table.images, *table.labels) if "{split}" in pattern.with_split("").text]
        if within and not split:
            raise ValueError(f"--split is missing: {table.name} has it within a name, as {within[0]}; give --split.")
        return
    choice = f"use one of {', '.join(table.splits)}"
    if split and not table.splits:
        raise ValueError(f"--split {split}: {table.name} has no splits; leave --split out.")
    if table.splits and not split:
        raise ValueError(f"--split is missing: {table.name} keeps its splits in folders; {choice}.")
    if split not in table.splits and split:
        raise ValueError(f"--split {split} is none of {table.name}; {choice}.")
