"""Builds the index of a folder of tars by reading what is in them, whoever made them."""

import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from iccld.data.decode import DECODE_ERRORS, IMAGE_EXTENSIONS, LABEL_EXTENSION, decode_label, image_size
from iccld.data.index import NUM_TRAIN_IDS, IndexHeader, ShardFile, ShardIndex, sample_dtype
from iccld.labels import IGNORE_INDEX

Place = tuple[int, int]
"""Offset and size of a member's bytes in its tar."""


def sync(path: Path) -> None:
    """Makes a written file, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def build_index(folder: str | Path, *, dataset: str = "", settings: Mapping[str, Any] | None = None) -> ShardIndex:
    """Reads every tar of `folder` once and writes the index, whole or not at all."""
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ValueError(f"{folder}: there are no .tar files to index.")
    if (folder / "index").exists():
        raise ValueError(f"{folder / 'index'} is there already; remove it to build it anew.")
    members = [(number, key, fields) for number, shard in enumerate(shards) for key, fields in _members(shard).items()]
    image_extension, label_extension = _extensions([set(fields) for _, _, fields in members], folder)
    records = [
        _record(shards[number], number, key, fields, image_extension, label_extension)
        for number, key, fields in members
    ]
    samples = np.array(records, sample_dtype(max((len(record[-1]) for record in records), default=1)))
    header = IndexHeader(
        dataset=dataset,
        shards=[ShardFile(shard.name, shard.stat().st_size) for shard in shards],
        num_samples=len(samples),
        has_labels=bool(label_extension),
        image_extension=image_extension,
        label_extension=label_extension,
        settings=dict(settings or {}),
    )
    _write(folder, header, samples)
    return ShardIndex.open(folder)


def _write(folder: Path, header: IndexHeader, samples: np.ndarray) -> None:
    temporary = folder / "index.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    np.save(temporary / "samples.npy", samples, allow_pickle=False)
    (temporary / "index.json").write_text(json.dumps(asdict(header), indent=2) + "\n")
    for path in (temporary / "samples.npy", temporary / "index.json", temporary):
        sync(path)
    temporary.rename(folder / "index")
    sync(folder)


def _members(shard: Path) -> dict[str, dict[str, Place]]:
    """Key to extension to place; as for webdataset, the extension starts at the first dot of the file's name."""
    samples: dict[str, dict[str, Place]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                directory, _, name = member.name.removeprefix("./").rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue
                stem, _, extension = name.partition(".")
                fields = samples.setdefault(f"{directory}/{stem}" if directory else stem, {})
                if extension in fields:
                    raise ValueError(f"{shard}: {member.name} is there twice; keys must be unique within a shard.")
                fields[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a whole, uncompressed tar ({error}); make it again.") from error
    return samples


def _extensions(samples: Sequence[set[str]], folder: Path) -> tuple[str, str]:
    """The extensions of images and labels ('' without labels), which must be the same in all samples."""
    common = set.intersection(*samples) if samples else set()
    images = [extension for extension in IMAGE_EXTENSIONS if extension in common]
    if samples and not images:
        raise ValueError(
            f"{folder}: the samples have no image extension in common (one of {', '.join(IMAGE_EXTENSIONS)}); "
            f"pack each image as KEY.EXTENSION, in one format for the whole set."
        )
    num_labelled = sum(LABEL_EXTENSION in fields for fields in samples)
    if 0 < num_labelled < len(samples):
        raise ValueError(
            f"{folder}: {len(samples) - num_labelled} of {len(samples)} samples have no {LABEL_EXTENSION}; "
            f"give labels to all samples or to none."
        )
    return (images[0] if images else IMAGE_EXTENSIONS[0]), (LABEL_EXTENSION if num_labelled else "")


def _record(
    shard: Path, number: int, key: str, fields: Mapping[str, Place], image_extension: str, label_extension: str
) -> tuple[Any, ...]:
    """The fields of `sample_dtype`, in order."""
    place, label_place = fields[image_extension], fields.get(label_extension, (0, 0))
    with shard.open("rb") as file:
        image = os.pread(file.fileno(), place[1], place[0])
        label = os.pread(file.fileno(), label_place[1], label_place[0])
    try:
        height, width = image_size(image)
        class_pixels = _class_pixels(label, (height, width)) if label else np.zeros(NUM_TRAIN_IDS, np.uint32)
    except DECODE_ERRORS as error:
        raise ValueError(f"{shard}: sample {key!r}: {error}; make the shard again without it.") from error
    checksums = zlib.crc32(image), zlib.crc32(label)
    return number, *place, *label_place, height, width, *checksums, class_pixels, key.encode()


def _class_pixels(label: bytes, size: tuple[int, int]) -> np.ndarray:
    ids = decode_label(label)
    if ids.shape != size:
        raise ValueError(f"the image has {size[0]}x{size[1]} pixels, its label {ids.shape[0]}x{ids.shape[1]}")
    counts = np.bincount(ids.ravel(), minlength=IGNORE_INDEX + 1)
    strange = [int(i) for i in np.flatnonzero(counts) if NUM_TRAIN_IDS <= i != IGNORE_INDEX]
    if strange:
        raise ValueError(f"the label holds {strange}; labels must be train ids 0-{NUM_TRAIN_IDS - 1} or {IGNORE_INDEX}")
    return counts[:NUM_TRAIN_IDS].astype(np.uint32)
