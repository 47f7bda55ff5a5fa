"""The embedded data set: procedural street scenes with exact labels, in two domains a known gap apart."""

from iccld.demo.scenes.export import write_cityscapes, write_gta5
from iccld.demo.scenes.render import render
from iccld.demo.scenes.world import Domain

__all__ = ["Domain", "render", "write_cityscapes", "write_gta5"]
