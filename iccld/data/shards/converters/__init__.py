"""Converters from each data set's own layout to pairs of an image and a label of train ids.

    a folder, a zip, or a folder of zips ── tree ─┐
    tables/NAME.yaml, or one of the user's own ───┴─ converter ── pairs, train ids

To add a data set: one YAML (`table` says what it may hold).
"""

from iccld.data.shards.converters.converter import DATASETS, Converter, open_converter
from iccld.data.shards.converters.pairing import Pair
from iccld.data.shards.converters.readers import UnknownIds
from iccld.data.shards.converters.tree import InputTree

__all__ = ["DATASETS", "Converter", "InputTree", "Pair", "UnknownIds", "open_converter"]
