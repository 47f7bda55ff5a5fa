"""Export of the embedded data set in the layouts of GTA5 and Cityscapes, so that it is read as the real sets are."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from iccld.data.processes import in_processes
from iccld.demo.scenes.render import render
from iccld.demo.scenes.world import Domain
from iccld.durable import make_folder, replacing, write_whole
from iccld.labels import CITYSCAPES_IDS, CITYSCAPES_PALETTE

CITIES = ("aachen", "bremen", "cologne")
VAL_START = 1_000_000  # number of the first validation image: more training images do not change it
_LABEL_IDS = np.zeros(256, np.uint8)  # 0 is "unlabeled" in both sets
_LABEL_IDS[list(range(19))] = CITYSCAPES_IDS
_FAST_PNG = 1


@dataclass(frozen=True)
class Frame:
    """Image to draw and the two files that it becomes."""

    number: int
    image: Path
    labels: Path


@dataclass(frozen=True)
class Settings:
    """Settings that decide a frame's pixels, besides its number."""

    domain: Domain
    seed: int
    height: int
    width: int


def write_gta5(folder: Path, *, count: int, seed: int, height: int, width: int, workers: int = 1) -> None:
    """Write `images/00001.png` and palettised `labels/00001.png` of `count` game images; whole files are kept."""
    frames = [
        Frame(n, folder / "images" / f"{n:05d}.png", folder / "labels" / f"{n:05d}.png") for n in range(1, count + 1)
    ]
    settings = Settings(Domain.GAME, seed, height, width)
    _write_all(folder, frames, settings, workers=workers)


def write_cityscapes(
    folder: Path, *, train: int, val: int, seed: int, height: int, width: int, workers: int = 1
) -> None:
    """Write `leftImg8bit/` and `gtFine/` labelIds of `train` + `val` camera images; whole files are kept."""
    frames = [
        *(_cityscapes_frame(folder, "train", n, CITIES[n % 2], n) for n in range(train)),
        *(_cityscapes_frame(folder, "val", VAL_START + n, CITIES[2], n) for n in range(val)),
    ]
    settings = Settings(Domain.CAMERA, seed, height, width)
    _write_all(folder, frames, settings, workers=workers)


def _cityscapes_frame(folder: Path, split: str, number: int, city: str, sequence: int) -> Frame:
    stem = f"{city}_{sequence:06d}_000019"
    image = folder / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
    return Frame(number, image, folder / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png")


def _write_all(folder: Path, frames: Sequence[Frame], settings: Settings, *, workers: int) -> None:
    with in_processes(partial(_write, settings=settings), workers) as drawn:
        _claim(folder, settings)
        for parent in {path.parent for frame in frames for path in (frame.image, frame.labels)}:
            make_folder(parent, within=folder)
        for _ in drawn(frame for frame in frames if not (frame.image.exists() and frame.labels.exists())):
            pass


def _claim(folder: Path, settings: Settings) -> None:
    """Note the settings in the folder, so that images of other settings are never taken for these."""
    note, wanted = folder / "scenes.json", {**asdict(settings), "domain": settings.domain.value}
    if note.exists():
        found = json.loads(note.read_text())
        if found != wanted:
            raise ValueError(
                f"scenes.folder={folder} holds images of {found}, asked for are {wanted}; "
                f"use the same settings, remove the folder, or name another one."
            )
        return
    make_folder(folder, within=folder)
    write_whole(note, json.dumps(wanted))


def _write(frame: Frame, *, settings: Settings) -> None:
    image, labels = render(
        seed=settings.seed, domain=settings.domain, number=frame.number, height=settings.height, width=settings.width
    )
    picture = Image.fromarray(_LABEL_IDS[labels])
    if settings.domain is Domain.GAME:
        picture.putpalette(_palette())
    _save(picture, frame.labels)
    _save(Image.fromarray(image), frame.image)


def _palette() -> list[int]:
    """Return 256 RGB triples: each label id has the colour of its class, the others are black."""
    colours = np.zeros((256, 3), np.uint8)
    colours[list(CITYSCAPES_IDS)] = CITYSCAPES_PALETTE
    return colours.reshape(-1).tolist()


def _save(picture: Image.Image, path: Path) -> None:
    """Write a file under another name and rename it, so that a file of the final name is whole."""
    with replacing(path, durably=False) as file:
        picture.save(file, format="PNG", compress_level=_FAST_PNG)
