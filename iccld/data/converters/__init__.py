"""From each data set's own layout to pairs of an image and a label of train ids.

To add a data set: one file with a subclass of `Converter`, and one line here.
"""

from collections.abc import Mapping

from iccld.data.converters.base import Converter, Pair, UnknownIds
from iccld.data.converters.cityscapes import Cityscapes
from iccld.data.converters.folder import PlainFolder
from iccld.data.converters.gta5 import GTA5

CONVERTERS: Mapping[str, type[Converter]] = {
    "gta5": GTA5,
    "cityscapes": Cityscapes,
    "folder": PlainFolder,
}

__all__ = ["CONVERTERS", "Converter", "Pair", "UnknownIds"]
