"""Segment images on disk: for each a palettised label PNG and a colour overlay, and pictures to compare predictions."""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor

from iccld.labels import ClassSet
from iccld.outcome import naming

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

Palette = Sequence[tuple[int, int, int]]


def predict_path(
    path: Path,
    output: Path,
    predict: Callable[[Tensor, Tensor], Tensor],
    *,
    class_set: ClassSet,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """Segment an image, or all images under a folder, and return the label PNGs written.

    `predict` takes images `(1, 3, H, W)` float32 in [0, 1] of any size and numbers `(1,)` int64, and returns logits
    `(1, K, H, W)`. Writes `<stem>_label.png` (8-bit, pixel values are class indices) and `<stem>_overlay.png` into
    `output`, in the folder's own sub-folders. Unreadable images are passed over and raised together at the end.
    """
    jobs = _jobs(path, output)
    written, unreadable = [], []
    # Progress goes to stderr, so that stdout stays the result's.
    for source, target in track(jobs.items(), "segmenting", total=len(jobs), console=Console(stderr=True)):
        try:
            image = read_image(source)
        except ValueError as error:
            unreadable.append(str(error))
            continue
        labels = _segment(image, predict, number=zlib.crc32(source.name.encode()), device=device)
        written.append(_write_pictures(image, labels, target, class_set.palette))
    if unreadable:
        lines = "\n  ".join(unreadable)
        raise ValueError(
            f"predict: {len(unreadable)} of {len(jobs)} images could not be read (the other {len(written)} are in "
            f"{output}); repair or remove them:\n  {lines}"
        )
    return written


def read_image(path: Path) -> np.ndarray:
    """`(H, W, 3)` uint8 RGB, upright by its EXIF tag; 16-bit grey is scaled to 8 bits and alpha is dropped."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
            if image.mode.startswith("I"):  # 16 bits, which PIL would clip to 255
                grey = np.clip(np.asarray(image, np.int64), 0, 65535)
                image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
            return np.array(image.convert("RGB"))
    # PIL raises SyntaxError for broken PNGs and its own error for images of absurd size.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {error}") from error


def colourise(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """`(H, W, 3)` uint8 colours of class indices `(H, W)` uint8; what the palette does not name is black."""
    return _colour_table(palette)[labels]


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette) -> np.ndarray:
    """`(H, W, 3)` uint8: half the image `(H, W, 3)` uint8, half the classes' colours."""
    return ((image.astype(np.uint16) + colourise(labels, palette) + 1) // 2).astype(np.uint8)


def comparison_picture(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> Image.Image:
    """A grid of RGB pictures `(H, W, 3)` uint8 with a title over each column; cells take the first picture's size."""
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


def _jobs(path: Path, output: Path) -> dict[Path, Path]:
    """Each image to read, and the path, less `_label.png`, of what is written for it."""
    if not path.exists():
        raise ValueError(f"predict: {path} does not exist; give an image or a folder of images.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"predict: the output {output} is a file and must be a folder; give another one.")
    if path.is_dir():
        folder, written = path.resolve(), output.resolve()
        if written == folder:
            raise ValueError(f"predict: the output folder {output} is the input folder; give another one.")
        named = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES)  # ._a.png is no image
        found = [p for p in named if p.is_file()]
        # An output folder inside the input folder holds an earlier run's pictures.
        nested = folder in written.parents
        root, sources = path, [p for p in found if not (nested and written in p.resolve().parents)]
    else:
        root, sources = path.parent, [path]
    if not sources:
        raise ValueError(f"predict: {path} holds no image ({', '.join(IMAGE_SUFFIXES)}); give another folder.")
    names = _distinct_names([source.relative_to(root) for source in sources])
    jobs = {source: output / name for source, name in zip(sources, names, strict=True)}
    inputs = {source.resolve() for source in sources}
    for target in jobs.values():
        for file in _files(target):
            if file.resolve() in inputs:
                raise ValueError(f"predict: {file} is an input and would be overwritten; give another output folder.")
    return jobs


def _distinct_names(paths: list[Path]) -> list[Path]:
    """Paths without suffix; those that would coincide (a.jpg and a.png) keep theirs."""
    names = [path.with_suffix("") for path in paths]
    while True:
        count = Counter(names)
        distinct = [path if count[name] > 1 else name for path, name in zip(paths, names, strict=True)]
        if distinct == names:
            return names
        names = distinct


def _segment(
    image: np.ndarray, predict: Callable[[Tensor, Tensor], Tensor], *, number: int, device: torch.device | str
) -> np.ndarray:
    """Class indices `(H, W)` uint8. The number keys the noise; it comes from the file's name, so that an image is
    segmented alike alone and among others."""
    images = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        logits = predict(images, torch.tensor([number], device=device))
    assert logits.shape[-2:] == images.shape[-2:], "predict must return logits of the image's size"
    return logits[0].argmax(0).to(torch.uint8).cpu().numpy()


def _write_pictures(image: np.ndarray, labels: np.ndarray, target: Path, palette: Palette) -> Path:
    """Write both pictures and return the label's path."""
    label_file, overlay_file = _files(target)
    indexed = Image.fromarray(labels)
    indexed.putpalette(_colour_table(palette).tobytes())  # all 256 entries, or PIL packs the indices into fewer bits
    _save(Image.fromarray(overlay(image, labels, palette)), overlay_file)
    _save(indexed, label_file)
    return label_file


def _colour_table(palette: Palette) -> np.ndarray:
    """`(256, 3)` uint8: the colour of each index, black beyond the palette."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table


def _files(target: Path) -> tuple[Path, Path]:
    """The label's and the overlay's file."""
    return target.with_name(f"{target.name}_label.png"), target.with_name(f"{target.name}_overlay.png")


def _save(picture: Image.Image, file: Path) -> None:
    """Write a PNG that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with naming(file, "the picture"):
            picture.save(temporary, format="PNG")
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _font(title: str, width: int, height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font, at most 70 % of the height, in which the title fits the width."""
    size = max(8, int(height * 0.7))
    while size > 8 and ImageFont.load_default(size).getlength(title) > width:
        size -= 1
    return ImageFont.load_default(size)
