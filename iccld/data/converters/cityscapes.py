"""Cityscapes (Cordts et al. 2016): leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png and gtFine/SPLIT/CITY/..."""

from pathlib import Path

from iccld.data.converters.base import Converter, Pair, evaluated
from iccld.labels import CITYSCAPES_ID_TO_TRAIN_ID

NUM_IDS = 34
_IMAGE_ENDING = "_leftImg8bit"


class Cityscapes(Converter):
    """The ids 0-33 of the `labelIds` files; a target set needs only `leftImg8bit`."""

    @classmethod
    def open(cls, root: Path, split: str, mapping: Path | None) -> "Cityscapes":
        if not split:
            raise ValueError("--split is missing: cityscapes keeps its splits in folders; use --split train or val.")
        return cls(root, split, evaluated(CITYSCAPES_ID_TO_TRAIN_ID, defined=range(NUM_IDS)))

    def image_folder(self) -> Path:
        return self.root / "leftImg8bit" / self.split

    def pair(self, image: Path) -> Pair | None:
        if not image.stem.endswith(_IMAGE_ENDING):
            return None
        name, city = image.stem.removesuffix(_IMAGE_ENDING), image.parent.relative_to(self.image_folder())
        return Pair(name, image, self.root / "gtFine" / self.split / city / f"{name}_gtFine_labelIds.png")

    def layout(self) -> str:
        return (
            "Cityscapes is laid out as leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png and "
            "gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png"
        )
