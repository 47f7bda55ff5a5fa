"""The embedded data set: procedural street scenes with exact labels, in two domains a known gap apart."""

from iccld.data.scenes.export import write_cityscapes, write_gta5
from iccld.data.scenes.render import render
from iccld.data.scenes.world import Domain

__all__ = ["Domain", "render", "write_cityscapes", "write_gta5"]
