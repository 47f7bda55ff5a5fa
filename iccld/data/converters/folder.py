"""A plain folder: [SPLIT/]images/NAME.* and [SPLIT/]labels/NAME.png, labels as train ids or with a mapping file."""

from pathlib import Path
from typing import Any

import yaml

from iccld.data.converters.base import Converter, Pair, relative_key
from iccld.labels import IGNORE_INDEX

TRAIN_IDS = {i: i for i in (*range(19), IGNORE_INDEX)}


class PlainFolder(Converter):
    """Any image files and PNG labels in two folders of one shape."""

    takes_mapping = True

    @classmethod
    def open(cls, root: Path, split: str, mapping: Path | None) -> "PlainFolder":
        return cls(root / split, split, TRAIN_IDS if mapping is None else read_mapping(mapping))

    def image_folder(self) -> Path:
        return self.root / "images"

    def pair(self, image: Path) -> Pair:
        key = relative_key(image, self.image_folder())
        return Pair(key, image, self.root / "labels" / f"{key}.png")

    def layout(self) -> str:
        return "a plain folder is laid out as images/NAME.jpg (or .png) and labels/NAME.png, below --split if given"


def read_mapping(path: Path) -> dict[int, int]:
    """A JSON or YAML file of `{old id: train id or 255}`."""
    rule = "write {old id: train id}, with train ids 0-18, or 255 for what is to be ignored"
    if not path.is_file():
        raise ValueError(f"--mapping {path}: there is no such file; {rule}.")
    try:
        content: Any = yaml.safe_load(path.read_text())  # JSON is YAML
        mapping = {int(old): int(new) for old, new in content.items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--mapping {path} is no mapping of numbers ({error}); {rule}.") from error
    strange = sorted(set(mapping.values()) - set(TRAIN_IDS))
    if strange or not mapping:
        raise ValueError(f"--mapping {path}: {strange or 'nothing'} on the right-hand side; {rule}.")
    return mapping
