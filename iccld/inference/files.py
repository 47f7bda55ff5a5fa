"""Segmentation of images on disk: a palettised label PNG and an overlay for each, and a legend beside them."""

import errno
import glob
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

from iccld.data.images.decode import DARK, LOOSE, MAX_BYTES, decode_image, find_format, is_dark
from iccld.durable import NotOursError, make_folder
from iccld.inference.pictures import legend, save_picture
from iccld.inference.prediction import Prediction
from iccld.inference.progress import counted
from iccld.outcome import lacks_memory

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The usual endings of images; the content decides."""
_OF_NO_INTEREST = ("Thumbs.db", "desktop.ini")
_NAME_ERRORS = {getattr(errno, name) for name in ("ENAMETOOLONG", "EILSEQ", "EINVAL", "EISDIR", "ENOTDIR", "EEXIST")}
"""The errors of writing that are about one name; all others are about the disk."""

LEGEND = "legend.png"

Segment = Callable[[np.ndarray, int], Prediction]
"""Function of an image `(H, W, 3)` uint8, and of the number that keys its noise, to the model's prediction."""


class UnusableFile(ValueError):
    """Error: one file cannot be read, segmented or written; the others go on."""

    def __init__(self, file: Path, what: object) -> None:
        super().__init__(f"{_spelled(file)}: {what}")


def predict_files(
    inputs: Sequence[Path], output: Path, segment: Segment, *, with_probabilities: bool = False
) -> list[Path]:
    """Segment images, all images under folders, and what patterns match; return the label PNGs written.

    Writes `<stem>_label.png` (8-bit, pixel values are class indices) and `<stem>_overlay.png` into `output`, in the
    folder's own sub-folders, linked ones too; `with_probabilities`, `<stem>_probabilities.npz` (see `Prediction.save`);
    and `legend.png`. Of several inputs, each folder has one of its name in `output`. An `output` that ends in .png is
    the label PNG of one image, alone.

    One file that cannot be segmented does not stop the others; all such files are named together at the end, in a
    ValueError. A disk that cannot be written is an OSError.
    """
    if output.suffix.lower() == ".png" and not output.is_dir():
        return [_predict_one(inputs, output, segment, with_probabilities=with_probabilities)]
    if output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        raise ValueError(f"predict: the output {output} would be a folder; label pictures are PNGs: end it in .png.")
    jobs, failures = _jobs(inputs, output, with_probabilities=with_probabilities)
    written, dark = list[Path](), list[Path]()
    for source, target in counted(jobs.items(), len(jobs)):
        try:
            image = read_image(source, dark=dark)
            with _enough_memory(source, image):
                prediction = segment(image, image_number(source))
                written.append(_write(prediction, target, within=output, with_probabilities=with_probabilities))
            if len(written) == 1:
                save_picture(legend(prediction.names, prediction.colours), output / LEGEND)
        except (UnusableFile, NotOursError) as error:
            failures.append(str(error))
        except OSError as error:
            said = f"{error.strerror or error}; {len(written)} of {len(jobs)} images are in {output}"
            raise OSError(error.errno, said, error.filename or str(_files(target)[1])) from error
    _note_dark(dark)
    if failures:
        total = len(written) + len(failures)
        raise ValueError(
            f"predict: {len(failures)} of {total} files were not segmented (the other {len(written)} are in {output}); "
            f"repair, move or remove them:\n  " + "\n  ".join(failures)
        )
    return written


def _predict_one(inputs: Sequence[Path], output: Path, segment: Segment, *, with_probabilities: bool) -> Path:
    """Predict one image to one label PNG."""
    found = expanded(inputs)
    if len(found) != 1 or found[0].is_dir():
        raise ValueError(f"predict: the output {output} is one picture, and takes one image; name a folder instead.")
    if with_probabilities:
        raise ValueError(f"predict: --probabilities needs a folder for its files, not {output}; name a folder.")
    if _real(output) == _real(found[0]):
        raise ValueError(f"predict: {output} is an input and would be overwritten; give another output.")
    dark: list[Path] = []
    image = read_image(found[0], dark=dark)
    _note_dark(dark)
    with _enough_memory(found[0], image):
        prediction = segment(image, image_number(found[0]))
    make_folder(output.parent, within=output.parent)
    prediction.save(output)
    return output


def expanded(inputs: Sequence[Path]) -> list[Path]:
    """Return the inputs, each pattern (`*`, `?`, `**`) replaced by its matches. Raises ValueError if one has none."""
    found: list[Path] = []
    for path in inputs:
        is_there = path.exists() or path.is_symlink()
        matches = [path] if is_there else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        if not matches:
            what = "matches nothing" if glob.has_magic(str(path)) else "does not exist"
            raise ValueError(f"predict: {path} {what}; give images, folders of images, or patterns.")
        found += matches
    return list(dict.fromkeys(found))


def image_number(path: Path) -> int:
    """Return the number that keys an image's noise, made of its name: it does not depend on other images."""
    return zlib.crc32(os.fsencode(path.name))


def read_image(path: Path, *, dark: list[Path] | None = None) -> np.ndarray:
    """Read `(H, W, 3)` uint8 RGB, upright; other depths are scaled to 8 bits, alpha is dropped. Raises UnusableFile.

    The path of an image that `is_dark` is added to `dark`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait
            raise ValueError("it is no plain file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"it has {status.st_size} bytes; an image may have {MAX_BYTES}")
        data = path.read_bytes()
        image = decode_image(data, formats=LOOSE)
        if dark is not None and is_dark(data, image):
            dark.append(path)
        return image
    except OSError as error:
        what = "it is a link that leads nowhere" if path.is_symlink() and not path.exists() else error.strerror
        raise UnusableFile(path, what) from error
    except MemoryError as error:
        raise UnusableFile(path, "memory does not suffice for it") from error
    except ValueError as error:
        raise UnusableFile(path, error) from error


def _note_dark(dark: Sequence[Path]) -> None:
    if dark:
        print(f"predict: {len(dark)} {DARK}, such as {_spelled(dark[0])}", file=sys.stderr)


def _jobs(inputs: Sequence[Path], output: Path, *, with_probabilities: bool) -> tuple[dict[Path, Path], list[str]]:
    """Return each image to read with the path, less `_label.png`, of its outputs; and notes on the rest."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"predict: the output {output} is a file and must be a folder; give another one.")
    found, places, paths = _Found([]), dict[Path, Path](), expanded(inputs)
    for path in paths:
        part = _found_in(path, output)
        root, name = (path, _name_of(path) if len(paths) > 1 else "") if path.is_dir() else (path.parent, "")
        places |= {source: Path(name, source.relative_to(root)) for source in part.images}
        found.failures += part.failures
        found.notes += part.notes
    for note in found.notes:
        print(f"predict: {note}", file=sys.stderr)
    if len(set(places.values())) < len(places):
        name = Counter(places.values()).most_common(1)[0][0]
        raise ValueError(f"predict: two inputs would be written as {output / name}; predict them into two folders.")
    names = _distinct_names(list(places.values()))
    jobs = {source: output / name for source, name in zip(places, names, strict=True)}
    read = {_real(source) for source in places}
    written = [file for target in jobs.values() for file in _files(target)[: 3 if with_probabilities else 2]]
    for file in (*written, output / LEGEND):
        if _real(file) in read:
            raise ValueError(f"predict: {file} is an input and would be overwritten; give another output folder.")
    return jobs, found.failures


def _name_of(folder: Path) -> str:
    """Return a folder's name; `.` and `..` have that of the folder that is meant."""
    return folder.name if folder.name not in ("", "..") else _real(folder).name


def _found_in(path: Path, output: Path) -> "_Found":
    """Find the images of one input. Raises ValueError if there is none."""
    if not path.is_dir():
        return _Found([path])
    if _real(output) == _real(path):
        raise ValueError(f"predict: the output folder {output} is the input folder; give another one.")
    found = _look_below(path, _real(output))
    if not found.images and not found.failures:
        raise ValueError(f"predict: {path} holds no image ({', '.join(IMAGE_SUFFIXES)}); give another folder.")
    return found


@dataclass
class _Found:
    """Images of a folder, other files with the reason, and notes that are no failure."""

    images: list[Path]
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _look_below(root: Path, written: Path) -> _Found:
    """Find every file below the folder, but for an earlier run's in `written`. No folder is read twice."""
    found, hidden, seen = _Found([]), 0, set[Path]()
    folders, links = [root], list[Path]()  # links come last, so that files are found in their own place first
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
    """Say why a file need not be tried; "" if its ending or its first bytes are an image's."""
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
    """Return where a path leads; unlike `resolve`, it takes links that lead to themselves, and names that cannot be."""
    return Path(os.path.realpath(path))


def _spelled(path: Path) -> str:
    """Write a path for a message of one line."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _distinct_names(paths: list[Path]) -> list[Path]:
    """Return paths without suffix; those that would coincide (a.jpg and a.png) keep theirs."""
    names = [path.with_suffix("") for path in paths]
    while True:
        count = Counter(names)
        distinct = [path if count[name] > 1 else name for path, name in zip(paths, names, strict=True)]
        if distinct == names:
            return names
        names = distinct


@contextmanager
def _enough_memory(source: Path, image: np.ndarray) -> Iterator[None]:
    """Turn a lack of memory for one image into UnusableFile: it does not stop the others."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        size = f"{image.shape[0]}x{image.shape[1]}"
        what = f"memory does not suffice for its {size} pixels; use --size or --sliding-window"
        raise UnusableFile(source, what) from error


def _write(prediction: Prediction, target: Path, *, within: Path, with_probabilities: bool) -> Path:
    """Write an image's files and return the label's path. Raises UnusableFile if its name cannot be written."""
    label_file, overlay_file, probabilities_file = _files(target)
    try:
        make_folder(target.parent, within=within)
        save_picture(prediction.overlay(), overlay_file)
        prediction.save(label_file)
        if with_probabilities:
            prediction.save(probabilities_file)
    except OSError as error:
        if error.errno not in _NAME_ERRORS:
            raise
        what = f"it cannot be written ({error.strerror}); rename its image, or what is in its place"
        raise UnusableFile(overlay_file, what) from error
    return label_file


def _files(target: Path) -> tuple[Path, Path, Path]:
    """Make the files of the labels, the overlay and the probabilities."""
    label, overlay, probabilities = (
        f"{target.name}_{what}" for what in ("label.png", "overlay.png", "probabilities.npz")
    )
    return target.with_name(label), target.with_name(overlay), target.with_name(probabilities)
