"""One chunk of pairs into one tar: read, check, resize, encode, write; bad pairs are collected, not fatal."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iccld.data.converters import Converter, Pair, UnknownIds
from iccld.data.decode import DECODE_ERRORS, LABEL_EXTENSION, decode_image
from iccld.data.indexing import sync

_LEAVE_OUT = "or leave bad pairs out with --accept-bad"


class ImageFormat(Enum):
    """How images are stored; `keep` copies a file's bytes where it need not be resized."""

    JPG = "jpg"
    PNG = "png"
    KEEP = "keep"


@dataclass(frozen=True)
class Packing:
    """How pairs are stored. `extension` is "jpg" or "png"; `keep_bytes` copies images that are not resized."""

    extension: str
    keep_bytes: bool
    quality: int
    with_labels: bool
    max_side: int
    exact_size: tuple[int, int] | None

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """The stored (height, width) of an image; `max_side` never enlarges."""
        if self.exact_size:
            return self.exact_size
        if not self.max_side or max(height, width) <= self.max_side:
            return height, width
        scale = self.max_side / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used: what is wrong with it, and what to do."""

    file: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.remedy}."


class BadPair(Exception):
    """Carries the problem of one pair to where problems are collected."""

    def __init__(self, file: Path, what: str, remedy: str) -> None:
        super().__init__(what)
        self.problem = Problem(str(file), what, f"{remedy}, {_LEAVE_OUT}")


def pack_shard(path: Path, pairs: Sequence[Pair], converter: Converter, packing: Packing) -> list[Problem]:
    """Writes the good ones of `pairs` as the tar `path`, which appears whole or, without any good pair, not at all."""
    from webdataset.writer import TarWriter  # imports torch, for which `--help` should not wait

    problems = []
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
            for pair in pairs:
                try:
                    writer.write({"__key__": pair.key, **encode_pair(pair, converter, packing)})
                except BadPair as bad:
                    problems.append(bad.problem)
        file.flush()
        os.fsync(file.fileno())
    if len(problems) < len(pairs):
        temporary.rename(path)
    else:
        temporary.unlink()
    sync(path.parent)
    return problems


def encode_pair(pair: Pair, converter: Converter, packing: Packing) -> dict[str, bytes]:
    """Extension to bytes of a pair's image and, with labels, its train ids."""
    try:
        data = pair.image.read_bytes()
        image = decode_image(data)
    except DECODE_ERRORS as error:
        raise BadPair(pair.image, f"the image cannot be read ({error})", "fetch or export it again") from error
    height, width = packing.size_of(*image.shape[:2])
    fields = {}
    if packing.with_labels:
        labels = Image.fromarray(_read_labels(pair, converter, image.shape[:2]))
        fields[LABEL_EXTENSION] = _encoded(labels.resize((width, height), Image.Resampling.NEAREST), "png")
    if packing.keep_bytes and (height, width) == image.shape[:2]:
        return {packing.extension: data, **fields}
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)  # antialiased where it shrinks
    if packing.extension == "png":
        return {"png": _encoded(resized, "png"), **fields}
    return {"jpg": _encoded(resized, "jpeg", quality=packing.quality, subsampling="4:2:0"), **fields}


def _read_labels(pair: Pair, converter: Converter, image_size: tuple[int, ...]) -> np.ndarray:
    assert pair.label is not None
    if not pair.label.is_file():
        raise BadPair(
            pair.image, f"it has no label ({pair.label} is missing)", "add it, use --no-labels for a target set"
        )
    try:
        labels = converter.train_ids(pair.label)
    except UnknownIds as error:
        raise BadPair(pair.label, str(error), "correct it, or complete the mapping") from error
    except DECODE_ERRORS as error:
        raise BadPair(pair.label, f"the label cannot be read ({error})", "fetch or export it again") from error
    if labels.shape != image_size:
        sizes = f"{labels.shape[0]}x{labels.shape[1]} pixels, its image {image_size[0]}x{image_size[1]}"
        raise BadPair(pair.label, f"the label has {sizes}", "export the two in one size")
    return labels


def _encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()
