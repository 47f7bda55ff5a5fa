"""Pictures of label maps: colours, overlays, palettised PNGs, legends, and grids to compare predictions."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iccld.durable import replacing
from iccld.outcome import naming

Palette = Sequence[tuple[int, int, int]]


def colourise(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Return colours `(H, W, 3)` uint8 of class indices `(H, W)` uint8; black if the palette lacks the index."""
    return _colour_table(palette)[labels]


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Return `(H, W, 3)` uint8: half the image `(H, W, 3)` uint8, half the classes' colours."""
    return ((image.astype(np.uint16) + colourise(labels, palette) + 1) // 2).astype(np.uint8)


def comparison_picture(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> Image.Image:
    """Make a grid of pictures `(H, W, 3)` uint8 with a title over each column; the first one's size is each cell's."""
    for number, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(
                f"comparison_picture: row {number} has {len(row)} pictures and there are {len(titles)} titles; "
                f"give one picture a title."
            )
    height, width = rows[0][0].shape[:2]
    gap, head = 4, max(16, width // 12)
    sheet = Image.new("RGB", ((width + gap) * len(titles) + gap, (height + gap) * len(rows) + head + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        left = gap + column * (width + gap)
        draw.text((left + width // 2, head // 2), title, fill="black", font=_font(title, width, head), anchor="mm")
        for number, row in enumerate(rows):
            cell = Image.fromarray(row[column]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(cell, (left, head + number * (height + gap)))
    return sheet


def label_picture(labels: np.ndarray, palette: Palette) -> Image.Image:
    """Make a palettised picture of class indices `(H, W)` uint8: pixel values are the indices, shown in colour."""
    picture = Image.fromarray(labels)
    picture.putpalette(_colour_table(palette).tobytes())  # all 256 entries, or PIL packs the indices into fewer bits
    return picture


def legend(names: Sequence[str], palette: Palette, *, only: Iterable[int] | None = None) -> Image.Image:
    """The classes' colours, each with its index and name, from top to bottom; `only` some indices, if given."""
    size = 20
    font = ImageFont.load_default(size)
    indices = range(len(names)) if only is None else sorted(only)
    lines = [f"{index} {names[index]}" for index in indices]
    width = 3 * size + max((int(font.getlength(line)) for line in lines), default=0)
    sheet = Image.new("RGB", (width, size // 2 + len(lines) * size * 3 // 2), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (index, line) in enumerate(zip(indices, lines, strict=True)):
        top = size // 2 + number * size * 3 // 2
        draw.rectangle((size // 2, top, size * 3 // 2, top + size), fill=tuple(palette[index]), outline="black")
        draw.text((2 * size, top + size // 2), line, fill="black", font=font, anchor="lm")
    return sheet


def save_picture(picture: Image.Image, file: Path) -> None:
    """Write a PNG that appears whole or not at all. Raises OSError."""
    with naming(file, "the picture"), replacing(file, durably=False) as opened:
        picture.save(opened, format="PNG")


def _colour_table(palette: Palette) -> np.ndarray:
    """Return the colour of each index, `(256, 3)` uint8, black beyond the palette."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table


def _font(title: str, width: int, height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the largest font, at most 70 % of the height, in which the title fits the width."""
    size = max(8, int(height * 0.7))
    while size > 8 and ImageFont.load_default(size).getlength(title) > width:
        size -= 1
    return ImageFont.load_default(size)
