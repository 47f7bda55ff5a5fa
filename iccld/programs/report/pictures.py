"""Pictures of a run, made small enough for the page and put into it.

A picture may be anyone's: it is decoded within bounds and encoded anew, so that nothing but its pixels gets into the
page. Links are passed over, as they may lead to files that are not the run's.
"""

import base64
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from iccld.data.images.decode import decode_image
from iccld.durable import is_real_folder
from iccld.programs.run.record import Record
from iccld.reading import read_limited
from iccld.texts import shown

PICTURE_FOLDERS = ("pictures", "predictions", "report")
MAX_SHOWN = 12  # the most pictures of a run
MAX_LISTED = 10_000  # the most files that are looked at below a folder
MAX_BYTES = 64 << 20
MAX_WIDTH = 960  # largest width in the page, in pixels
FEW_COLOURS = 256
IN_TRAINING = re.compile(r"step_\d+\.png")
QUALITY = 88


@dataclass(frozen=True)
class Picture:
    """Picture for the page. `name`: the path below the run directory. `url` holds the pixels."""

    name: str
    url: str
    width: int
    height: int


def pictures_of(record: Record) -> list[Picture]:
    """Some of each folder, at most `MAX_SHOWN` (see `_chosen`); what cannot be read is noted in the record."""
    found: list[Picture] = []
    for folder in PICTURE_FOLDERS:
        paths = _chosen(sorted(_files(record.run_dir / folder), key=_natural))
        for path in paths[: MAX_SHOWN - len(found)]:
            try:
                found.append(_embedded(path, record.run_dir))
            except (ValueError, OSError) as error:
                record.notes.append(shown(f"{path}: no picture that can be shown ({error})"))
    return found


def _chosen(paths: list[Path]) -> list[Path]:
    """The newest by name; of pictures drawn in training, some from the first to the last of each stage."""
    stages: dict[Path, list[Path]] = {}
    for path in paths:
        if IN_TRAINING.fullmatch(path.name):
            stages.setdefault(path.parent, []).append(path)
    spread = [path for drawn in stages.values() for path in _spread(drawn, MAX_SHOWN // 2 // len(stages) or 1)]
    others = [path for path in paths if not IN_TRAINING.fullmatch(path.name)]
    return spread + others[len(others) - min(len(others), MAX_SHOWN - len(spread)) :]


def _spread(paths: list[Path], count: int) -> list[Path]:
    """Choose at most `count` of them, the last one among them."""
    count = min(count, len(paths))
    return [paths[round((i + 1) * len(paths) / count) - 1] for i in range(count)]


def _files(folder: Path) -> Iterator[Path]:
    """Find PNGs and JPEGs below a folder, without label maps (their overlays are shown) and without links."""
    if not is_real_folder(folder):
        return
    for path in itertools.islice(folder.rglob("*"), MAX_LISTED):  # which follows no links
        wanted = path.suffix.lower() in (".png", ".jpg", ".jpeg") and not path.stem.endswith("_label")
        if wanted and path.is_file() and not path.is_symlink():
            yield path


def _natural(path: Path) -> list[tuple[int, str]]:
    """Make a sorting key that orders numbers by size: step_100 after step_20."""
    return [(int(word[:18]), "") if word.isdecimal() else (-1, word) for word in re.split(r"(\d+)", str(path))]


def _embedded(path: Path, run_dir: Path) -> Picture:
    image = Image.fromarray(decode_image(read_limited(path, MAX_BYTES)))
    few = image.getcolors(FEW_COLOURS) is not None
    width = min(image.width, MAX_WIDTH)
    height = max(1, round(image.height * width / image.width))
    if width < image.width:
        image = image.resize((width, height), Image.Resampling.NEAREST if few else Image.Resampling.LANCZOS)
    data = io.BytesIO()
    if few:
        image.quantize(FEW_COLOURS).save(data, format="PNG", optimize=True)
    else:
        image.save(data, format="JPEG", quality=QUALITY)
    url = f"data:image/{'png' if few else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"
    return Picture(shown(path.relative_to(run_dir).as_posix()), url, width, height)
