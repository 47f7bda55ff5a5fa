"""Segment images on disk: for each a palettised label PNG and a colour overlay, and pictures to compare predictions."""

import errno
import os
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from torch import Tensor

from iccld.data.images.decode import LOOSE, MAX_BYTES, decode_image, find_format
from iccld.durable import NotOursError, make_folder, replacing
from iccld.labels import ClassSet
from iccld.outcome import naming

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The endings that images usually have; what counts is the content."""
_OF_NO_INTEREST = ("Thumbs.db", "desktop.ini")
_NAME_ERRORS = {getattr(errno, name) for name in ("ENAMETOOLONG", "EILSEQ", "EINVAL", "EISDIR", "ENOTDIR", "EEXIST")}
"""The errors of writing that are about one name; all others are about the disk."""

Palette = Sequence[tuple[int, int, int]]


class UnusableFile(ValueError):
    """One file that cannot be read, segmented or written, which is no reason to stop: which, and why."""

    def __init__(self, file: Path, what: object) -> None:
        super().__init__(f"{_spelled(file)}: {what}")


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
    `output`, in the folder's own sub-folders, linked ones too. One file that cannot be segmented does not stop the
    others; all such files are named together at the end, in a ValueError. A disk that cannot be written is an OSError.
    """
    jobs, failures = _jobs(path, output)
    written: list[Path] = []
    # Progress goes to stderr, so that stdout stays the result's.
    for source, target in track(jobs.items(), "segmenting", total=len(jobs), console=Console(stderr=True)):
        number = zlib.crc32(os.fsencode(source.name))
        try:
            image = read_image(source)
            with _enough_memory(source, image):
                labels = _segment(image, predict, number=number, device=device)
            written.append(_write_pictures(image, labels, target, class_set.palette, within=output))
        except (UnusableFile, NotOursError) as error:
            failures.append(str(error))
        except OSError as error:
            said = f"{error.strerror or error}; {len(written)} of {len(jobs)} images are in {output}"
            raise OSError(error.errno, said, error.filename or str(_files(target)[1])) from error
    if failures:
        total = len(written) + len(failures)
        raise ValueError(
            f"predict: {len(failures)} of {total} files were not segmented (the other {len(written)} are in {output}); "
            f"repair, move or remove them:\n  " + "\n  ".join(failures)
        )
    return written


def read_image(path: Path) -> np.ndarray:
    """`(H, W, 3)` uint8 RGB, upright; other depths are scaled to 8 bits, alpha is dropped. Raises UnusableFile."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep us waiting
            raise ValueError("it is no plain file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"it has {status.st_size} bytes; an image may have {MAX_BYTES}")
        return decode_image(path.read_bytes(), formats=LOOSE)
    except OSError as error:
        what = "it is a link that leads nowhere" if path.is_symlink() and not path.exists() else error.strerror
        raise UnusableFile(path, what) from error
    except MemoryError as error:
        raise UnusableFile(path, "memory does not suffice for it") from error
    except ValueError as error:
        raise UnusableFile(path, error) from error


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


def _jobs(path: Path, output: Path) -> tuple[dict[Path, Path], list[str]]:
    """Each image to read, and the path, less `_label.png`, of what is written for it; and what else there is."""
    if not (path.exists() or path.is_symlink()):
        raise ValueError(f"predict: {path} does not exist; give an image or a folder of images.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"predict: the output {output} is a file and must be a folder; give another one.")
    if path.is_dir():
        if _real(output) == _real(path):
            raise ValueError(f"predict: the output folder {output} is the input folder; give another one.")
        found = _look_below(path, _real(output))
    else:
        found = _Found([path])
    if not found.images and not found.failures:
        raise ValueError(f"predict: {path} holds no image ({', '.join(IMAGE_SUFFIXES)}); give another folder.")
    for note in found.notes:
        print(f"predict: {note}", file=sys.stderr)
    root = path if path.is_dir() else path.parent
    names = _distinct_names([source.relative_to(root) for source in found.images])
    jobs = {source: output / name for source, name in zip(found.images, names, strict=True)}
    inputs = {_real(source) for source in found.images}
    for target in jobs.values():
        for file in _files(target):
            if _real(file) in inputs:
                raise ValueError(f"predict: {file} is an input and would be overwritten; give another output folder.")
    return jobs, found.failures


@dataclass
class _Found:
    """The images of a folder, what in it is none and why, and what is worth a line but no failure."""

    images: list[Path]
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _look_below(root: Path, written: Path) -> _Found:
    """Every file below the folder, but for an earlier run's in `written`. No folder is read twice, however linked."""
    found, hidden, seen = _Found([]), 0, set[Path]()
    folders, links = [root], list[Path]()  # what is linked comes last, so that it is found in its own place first
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = _real(folder)
        if real == written or (written in real.parents and _real(root) in written.parents):
            continue
        if real in seen:
            found.notes.append(f"{_spelled(folder)} links to a folder that is segmented already ({_spelled(real)})")
            continue
        seen.add(real)
        try:
            entries = sorted(folder.iterdir())
            kinds = [(entry, entry.is_dir()) for entry in entries]
        except OSError as error:
            found.failures.append(f"{_spelled(folder)}: the folder cannot be read ({error.strerror})")
            continue
        for entry, is_folder in kinds:
            if entry.name.startswith(".") or entry.name in _OF_NO_INTEREST:
                hidden += 1
            elif is_folder:
                (links if entry.is_symlink() else folders).append(entry)
            elif what := _why_no_image(entry):
                found.failures.append(f"{_spelled(entry)}: {what}")
            else:
                found.images.append(entry)
    found.images.sort()
    found.failures.sort()
    found.notes += [f"{hidden} hidden files and folders were passed over"] if hidden else []
    return found


def _why_no_image(file: Path) -> str:
    """Why a file need not be tried; empty for what is an image by its ending or its first bytes."""
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return ""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return "it is no plain file"
        with file.open("rb") as opened:
            return "" if find_format(opened.read(16)) else "it is no image of a known format"
    except OSError as error:
        return error.strerror or str(error)


def _real(path: Path) -> Path:
    """Where a path leads; unlike `resolve`, it takes links that lead to themselves, and names that cannot be."""
    return Path(os.path.realpath(path))


def _spelled(path: Path) -> str:
    """A path in a message of one line."""
    return str(path) if str(path).isprintable() else repr(str(path))


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


@contextmanager
def _enough_memory(source: Path, image: np.ndarray) -> Iterator[None]:
    """An image that the machine is too small for does not stop the others."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not short:
            raise
        size = f"{image.shape[0]}x{image.shape[1]}"
        what = f"memory does not suffice for its {size} pixels; use --size or --sliding-window"
        raise UnusableFile(source, what) from error


def _write_pictures(image: np.ndarray, labels: np.ndarray, target: Path, palette: Palette, *, within: Path) -> Path:
    """Write both pictures and return the label's path. Raises UnusableFile where its name cannot be written."""
    label_file, overlay_file = _files(target)
    indexed = Image.fromarray(labels)
    indexed.putpalette(_colour_table(palette).tobytes())  # all 256 entries, or PIL packs the indices into fewer bits
    try:
        make_folder(target.parent, within=within)
        _save(Image.fromarray(overlay(image, labels, palette)), overlay_file)
        _save(indexed, label_file)
    except OSError as error:
        if error.errno not in _NAME_ERRORS:
            raise
        what = f"it cannot be written ({error.strerror}); rename its image, or what is in its place"
        raise UnusableFile(overlay_file, what) from error
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
    with naming(file, "the picture"), replacing(file, durably=False) as opened:
        picture.save(opened, format="PNG")


def _font(title: str, width: int, height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font, at most 70 % of the height, in which the title fits the width."""
    size = max(8, int(height * 0.7))
    while size > 8 and ImageFont.load_default(size).getlength(title) > width:
        size -= 1
    return ImageFont.load_default(size)
