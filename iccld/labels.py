"""Class sets, palettes, and the maps from each data set's ids to Cityscapes train ids. 255 is ignored everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

IGNORE_INDEX = 255

CITYSCAPES_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CITYSCAPES_PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
    (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The Cityscapes (and GTA5) label id of each train id."""

CLASS_SUBSETS: Mapping[int, tuple[int, ...]] = {
    19: tuple(range(19)),
    16: tuple(i for i in range(19) if i not in (9, 14, 16)),
    13: tuple(i for i in range(19) if i not in (3, 4, 5, 9, 14, 16)),
}
"""The train ids that mIoU-19, mIoU-16 (SYNTHIA) and mIoU-13 average over."""

CITYSCAPES_THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
"""The train ids of countable objects, as DAFormer's feature distance takes them."""

MAX_CLASSES = 254
"""Class indices are 0-253: 255 is ignored, and 254 stays free."""


def lookup_table(mapping: Mapping[int, int]) -> "np.ndarray":
    """Return a table from old to new ids, `(256,)` uint8; ids that `mapping` does not name become 255."""
    import numpy as np  # the settings, which build class sets, are shown without it

    table = np.full(256, IGNORE_INDEX, np.uint8)
    for old, new in mapping.items():
        table[old] = new
    return table


CITYSCAPES_ID_TO_TRAIN_ID: Mapping[int, int] = {label_id: i for i, label_id in enumerate(CITYSCAPES_IDS)}


@dataclass(frozen=True)
class ClassSet:
    """Classes that a model tells apart, and the classes that the ids in the shards' labels become.

    `of_train_id` maps an id to a class index; an id that it does not name is ignored (255). `id_names` are the classes
    that the ids stand for: a set of shards fits if its own are the same. `rare` and `things` are class indices.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    of_train_id: Mapping[int, int]
    id_names: tuple[str, ...] = CITYSCAPES_NAMES
    rare: tuple[int, ...] = ()
    things: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        indices = set(self.of_train_id.values())
        if len(self.names) != len(self.palette) or indices != set(range(len(self.names))):
            raise ValueError(
                f"class_set: {len(self.names)} names, {len(self.palette)} colours and class indices {sorted(indices)}; "
                f"every class needs one name, one colour and at least one train id."
            )

    @property
    def num_classes(self) -> int:
        return len(self.names)

    def table(self) -> "np.ndarray":
        """Return the class index of each train id, `(256,)` uint8; 255 is ignored."""
        return lookup_table(self.of_train_id)

    def subset(self, num_classes: int) -> tuple[int, ...]:
        """Return the class indices that mIoU-`num_classes` averages over; only Cityscapes' 19 have proper subsets."""
        if num_classes == self.num_classes:
            return tuple(range(self.num_classes))
        if self.names == CITYSCAPES_NAMES and num_classes in CLASS_SUBSETS:
            return CLASS_SUBSETS[num_classes]
        raise ValueError(
            f"evaluation.num_classes={num_classes} does not fit a model of {self.num_classes} classes; "
            f"use {self.num_classes}{', 16 or 13' if self.names == CITYSCAPES_NAMES else ''}."
        )


CITYSCAPES_19 = ClassSet(CITYSCAPES_NAMES, CITYSCAPES_PALETTE, {i: i for i in range(19)}, things=CITYSCAPES_THINGS)


def own_class_set(
    names: Sequence[str], colors: Sequence[Sequence[int]], *, rare: Sequence[str] = (), things: Sequence[str] = ()
) -> ClassSet:
    """Make a set of one's own classes: the ids in the labels are their indices. `rare` and `things` are names.

    Raises ValueError if names or colours repeat or are missing, are no printable text, or are no colours.
    """
    if strange := [name for name in names if not isinstance(name, str) or not name.isprintable()]:
        raise ValueError(f"classes: {str(strange[0])[:80]!r} must be a name of printable letters.")
    if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) != len(names):
        raise ValueError(f"classes: {len(names)} names must be 2 to {MAX_CLASSES}, each its own.")
    if len(colors) != len(names) or not all(is_color(color) for color in colors):
        raise ValueError(f"classes: {len(names)} names need {len(names)} colours of three numbers from 0 to 255.")
    if unknown := [name for name in (*rare, *things) if name not in names]:
        raise ValueError(f"classes: {unknown[0]!r} is said to be rare or a thing, and is no class.")
    marked = [tuple(i for i, name in enumerate(names) if name in chosen) for chosen in (rare, things)]
    palette = tuple((int(r), int(g), int(b)) for r, g, b in colors)
    identity = {i: i for i in range(len(names))}
    return ClassSet(tuple(names), palette, identity, tuple(names), rare=marked[0], things=marked[1])


def is_color(value: object) -> bool:
    """Tell whether a value is a list of three whole numbers from 0 to 255."""
    return isinstance(value, list | tuple) and len(value) == 3 and all(type(v) is int and 0 <= v < 256 for v in value)


def merged_class_set(names: Sequence[str], of_train_id: Mapping[int, int]) -> ClassSet:
    """Make a class set that merges or drops train ids; a class takes the colour of its first train id."""
    bad = [i for i in of_train_id if not 0 <= i < 19] + [c for c in of_train_id.values() if not 0 <= c < len(names)]
    if bad:
        raise ValueError(f"data.class_set: {bad} out of range; map train ids 0-18 to class indices 0-{len(names) - 1}.")
    first = {c: min(i for i, owner in of_train_id.items() if owner == c) for c in set(of_train_id.values())}
    palette = tuple(CITYSCAPES_PALETTE[first[c]] for c in sorted(first))
    things = tuple(c for c in sorted(first) if first[c] in CITYSCAPES_THINGS)
    return ClassSet(tuple(names), palette, dict(of_train_id), things=things)
