"""GTA5 (Richter et al. 2016): images/NAME.png and labels/NAME.png, palettised PNGs of Cityscapes-like ids."""

from pathlib import Path

from iccld.data.converters.base import Converter, Pair, evaluated, relative_key
from iccld.labels import CITYSCAPES_ID_TO_TRAIN_ID

NUM_IDS = 35


class GTA5(Converter):
    """The ids 0-34; a few of the published pairs differ in size and are listed as bad."""

    @classmethod
    def open(cls, root: Path, split: str, mapping: Path | None) -> "GTA5":
        if split:
            raise ValueError(f"--split {split}: gta5 has no folders of splits; leave --split out.")
        return cls(root, split, evaluated(CITYSCAPES_ID_TO_TRAIN_ID, defined=range(NUM_IDS)))

    def image_folder(self) -> Path:
        return self.root / "images"

    def pair(self, image: Path) -> Pair:
        key = relative_key(image, self.image_folder())
        return Pair(key, image, self.root / "labels" / f"{key}.png")

    def layout(self) -> str:
        return "GTA5 is laid out as images/NAME.png and labels/NAME.png"
