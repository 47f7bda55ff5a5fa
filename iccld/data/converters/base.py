"""What a converter is: where a data set's pairs lie, and what its label ids mean."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from iccld.data.decode import decode_label
from iccld.labels import IGNORE_INDEX

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_IDS = 1 << 16


@dataclass(frozen=True)
class Pair:
    """An image and where its label belongs (whether that file exists or not); None where labels are not wanted."""

    key: str
    image: Path
    label: Path | None


class UnknownIds(ValueError):
    """A label file holds ids that its data set, or its mapping, does not define."""


class Converter(ABC):
    """One data set's layout and label ids.

    `ids` maps every id that the data set defines to its train id, or to 255 where it is not evaluated; any other id in
    a label file is an error.
    """

    takes_mapping: ClassVar[bool] = False

    def __init__(self, root: Path, split: str, ids: Mapping[int, int]) -> None:
        self.root, self.split, self.ids = root, split, dict(ids)

    @classmethod
    @abstractmethod
    def open(cls, root: Path, split: str, mapping: Path | None) -> "Converter":
        """Checks the split and the mapping file; `mapping` is None unless `takes_mapping`."""

    @abstractmethod
    def image_folder(self) -> Path:
        """The folder under which all images of the split lie."""

    @abstractmethod
    def pair(self, image: Path) -> Pair | None:
        """The pair of an image file, or None if the file is no image of the set."""

    def pairs(self) -> list[Pair]:
        """All pairs, sorted by the image's path."""
        folder = self.image_folder()
        if not folder.is_dir():
            raise ValueError(f"--input {self.root}: {folder} is missing; {self.layout()}.")
        files = sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES)
        pairs = [pair for pair in map(self.pair, files) if pair is not None]
        if not pairs:
            raise ValueError(f"--input {self.root}: {folder} holds no images; {self.layout()}.")
        return pairs

    @abstractmethod
    def layout(self) -> str:
        """The expected layout, as half a sentence for errors."""

    def train_ids(self, path: Path) -> np.ndarray:
        """The `(H, W)` uint8 train ids of a label file."""
        return map_ids(decode_label(path.read_bytes()), self.ids)


def map_ids(ids: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    """`(H, W)` integer ids to uint8 train ids; an id that `mapping` does not name is an error."""
    largest = int(ids.max(initial=0))
    if largest >= MAX_IDS:
        raise UnknownIds(f"the label holds ids up to {largest}; ids must be below {MAX_IDS}")
    found = np.flatnonzero(np.bincount(ids.ravel())).tolist()
    unknown = [i for i in found if i not in mapping]
    if unknown:
        raise UnknownIds(f"the label holds ids that its data set or mapping does not define: {unknown}")
    table = np.zeros(largest + 1, np.uint8)
    for i in found:
        table[i] = mapping[i]
    return table[ids]


def evaluated(train_ids: Mapping[int, int], *, defined: Iterable[int]) -> dict[int, int]:
    """Every defined id to its train id, or to 255 where it has none."""
    return {i: train_ids.get(i, IGNORE_INDEX) for i in defined}


def relative_key(image: Path, folder: Path) -> str:
    """A key from the image's path below `folder`, without its suffix."""
    return image.relative_to(folder).with_suffix("").as_posix()
