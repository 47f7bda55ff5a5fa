"""Packing of a data set into shards: WebDataset tars of images and labels of train ids, and their index.

    images, labels ── converter ── pairs ─┬─ chunk ── shard-000000.tar ─┐
                                          ├─ chunk ── shard-000001.tar ─┼── index/ (last: it says that all is done)
                                          └─ ...                       ─┘

Chunk i of the sorted pairs, without the bad ones, becomes shard i (or several, with a limit of bytes), in any of the
worker processes. `making/` remembers what is finished, so that the same command goes on where it was interrupted.
"""

import json
import re
import sys
import zlib
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from iccld.data.classes import CITYSCAPES, classes_of
from iccld.data.images.decode import MAX_PIXELS
from iccld.data.processes import say, usable_cpus
from iccld.data.shards.chunks import ChunkPacker, ChunkReport, check_tar_writer, pack_chunks
from iccld.data.shards.converters import DATASETS, Converter, Pair, open_converter
from iccld.data.shards.describing import lacking_classes
from iccld.data.shards.indexing import IndexResult
from iccld.data.shards.labels_found import UntoldIdsError, check_labels
from iccld.data.shards.packing import MAX_SIDES, ImageFormat, Packing
from iccld.data.shards.records import finish_index, join_records
from iccld.data.shards.tally import Tally, plain
from iccld.data.shards.work_folder import MAKING_FOLDER, alone_in, clear
from iccld.data.storage.index import INDEX_FOLDER, ShardIndex
from iccld.durable import make_folder, refuse_links, write_whole
from iccld.reading import read_json

_NOT_CONTENT = ("output", "accept_bad", "mapping", "classes", "num_workers")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass
class MakeShardsConfig:
    """Settings of `iccld shards make`. At most one of `max_side` and `height` x `width` resizes; 0 is off.

    A shard is closed when it holds `samples_per_shard`, or when one more would bring it above `bytes_per_shard` (0: any
    number of bytes). `input` is a folder or a zip, `mapping` and `classes` are files, the latter also "cityscapes".
    """

    dataset: str
    input: str
    output: str
    split: str = ""
    no_labels: bool = False
    mapping: str = ""
    classes: str = ""
    max_side: int = 0
    height: int = 0
    width: int = 0
    image_format: ImageFormat = ImageFormat.JPG
    quality: int = 95
    samples_per_shard: int = 1000
    bytes_per_shard: int = 0
    accept_bad: bool = False
    num_workers: int = 1

    def __post_init__(self) -> None:
        if min(self.max_side, self.height, self.width) < 0 or bool(self.height) != bool(self.width):
            raise ValueError("--max-side and --size must be positive; give --size as HEIGHTxWIDTH, as in 512x1024.")
        if self.max_side and self.height:
            raise ValueError(f"--max-side {self.max_side} and --size exclude each other; leave one out.")
        limit = MAX_SIDES.get(self.image_format, MAX_PIXELS)
        if max(self.max_side, self.height, self.width) > limit or self.height * self.width > MAX_PIXELS:
            size = f"--max-side {self.max_side}" if self.max_side else f"--size {self.height}x{self.width}"
            most = f"{limit} pixels a side and {MAX_PIXELS} in all with --image-format {self.image_format.value}"
            raise ValueError(f"{size} is too large: an image may have {most}.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality} must be between 1 and 100; 95 is usual.")
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard {self.samples_per_shard} must be at least 1; 1000 is usual.")
        if self.bytes_per_shard < 0:
            raise ValueError(f"--bytes-per-shard {self.bytes_per_shard} must be positive; 1G is usual.")

    def settings(self) -> dict[str, Any]:
        """Return the settings that the shards' content depends on, as JSON."""
        own = asdict(self) | {"image_format": self.image_format.value, "input": str(Path(self.input).resolve())}
        return {name: value for name, value in own.items() if name not in _NOT_CONTENT}

    def packing(self) -> Packing:
        """Return how each pair is to be stored."""
        size = (self.height, self.width) if self.height else None
        return Packing(
            self.image_format, self.quality, not self.no_labels, self.max_side, size, max_bytes=self.bytes_per_shard
        )


def make_shards(config: MakeShardsConfig, *, progress: Callable[[str], None] = say) -> IndexResult:
    """Make the shards of a data set; the same command again keeps the finished ones.

    The result has no index if bad pairs were found and not accepted, or if all pairs are bad. Raises ValueError if the
    user erred, or if another process makes the same shards, and ModuleNotFoundError without webdataset.
    """
    converter, output = _converter(config), Path(config.output)
    settings = config.settings() | {"converter": converter.describe()}
    if (output / INDEX_FOLDER).is_dir() and not (output / MAKING_FOLDER).exists():
        return _keep_finished(output, settings, progress)
    check_tar_writer()
    survey = converter.survey(with_labels=not config.no_labels)
    if not config.no_labels:
        check_labels(converter, survey.pairs, f"--input {config.input}")
    pairs = _with_safe_keys(survey.pairs)
    _check_output(output)
    for line in survey.passed_over.lines():
        progress(line)
    if spare := survey.spare_labels:
        progress(f"{len(spare)} label files belong to no image, such as {plain(converter.tree.location(spare[0]))}")
    with alone_in(output, MAKING_FOLDER) as making:
        if (output / INDEX_FOLDER).is_dir():  # finished since, or the work folder was left behind
            clear(making)
            return _keep_finished(output, settings, progress)
        _prepare(output, making, settings, pairs)
        size, pack = config.samples_per_shard, ChunkPacker(converter, config.packing(), output)
        chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        reports = pack_chunks(
            chunks, pack, keep_bad=config.accept_bad, num_workers=config.num_workers, progress=progress
        )
        bad_pairs = [problem for report in reports for problem in report.problems]
        problems = [*survey.problems, *bad_pairs]
        if len(bad_pairs) == len(pairs) or (problems and not config.accept_bad):
            return IndexResult(None, problems)
        index = _finish(output, reports, converter, settings | {"left_out": len(problems)})
        clear(making)
    for line in _closing_lines(index, reports):
        progress(line)
    return IndexResult(index, problems)


def _closing_lines(index: ShardIndex, reports: Sequence[ChunkReport]) -> list[str]:
    """Say what the user may not expect of the samples."""
    lacking = lacking_classes(index.header) if index.header.has_labels else []
    lines = [f"{index.location} shows none of: {', '.join(lacking)}"] if lacking else []
    return Tally().update(report.noted for report in reports).lines() + lines


def _converter(config: MakeShardsConfig) -> Converter:
    mapping, classes = Path(config.mapping) if config.mapping else None, classes_of(config.classes)
    options = {"split": config.split, "mapping": mapping, "classes": classes}
    converter = open_converter(config.dataset, Path(config.input), **options)
    converter.is_told |= config.classes == CITYSCAPES
    return converter


def _check_output(output: Path) -> None:
    """Make the output folder; refuse one that holds other things."""
    try:
        make_folder(output, within=output)
        strange = sorted(output.iterdir())
    except OSError as error:
        raise ValueError(f"--output {output} cannot be a folder ({error.strerror}); use another --output.") from error
    refuse_links(output / MAKING_FOLDER, within=output)
    if strange and not any((output / name).is_dir() for name in (MAKING_FOLDER, INDEX_FOLDER)):
        raise ValueError(
            f"--output {output} holds {strange[0]} and was not made by this command; use another --output."
        )


def _keep_finished(output: Path, settings: dict[str, Any], progress: Callable[[str], None]) -> IndexResult:
    index = ShardIndex.open(output, setting="--output")
    _check_same(index.header.settings, settings, output)
    note = "pairs mended or added since take a new folder"
    progress(f"{output} is finished already with these settings: {len(index)} samples are kept; {note}.")
    return IndexResult(index, [])


def _check_same(old: dict[str, Any], new: dict[str, Any], output: Path) -> None:
    different = [f"{name} (was {old.get(name)}, is {new[name]})" for name in new if old.get(name) != new[name]]
    if different:
        raise ValueError(
            f"--output {output} holds shards made with other settings: {', '.join(different)}; "
            f"use another --output, or remove the folder to make them anew."
        )


def _prepare(output: Path, making: Path, settings: dict[str, Any], pairs: Sequence[Pair]) -> None:
    """Leave in `output` only what an interrupted run of the same settings and pairs has finished."""
    marker = making / "settings.json"
    state = {"settings": settings, "pairs": zlib.crc32("\n".join(pair.key for pair in pairs).encode())}
    if marker.is_file():
        old = read_json(marker)
        if not isinstance(old, dict) or not isinstance(old.get("settings"), dict):
            raise ValueError(f"{marker} is not what it should be; remove {output} to make the shards anew.")
        if any(output.glob("shard-*.tar")):  # nothing was finished, so to begin anew loses nothing
            _check_same(old["settings"], settings, output)
        if old == state:
            for path in making.glob("*.tmp"):
                path.unlink()
            return
    elif strange := next(output.glob("shard-*.tar"), None):
        raise ValueError(f"--output {output} holds {strange.name}, which was not made there; use another --output.")
    for shard in output.glob("shard-*.tar"):
        shard.unlink()
    clear(making)
    write_whole(marker, json.dumps(state).encode())


def _with_safe_keys(pairs: Sequence[Pair]) -> list[Pair]:
    """Return keys without dots, slashes and the like, which WebDataset readers would misread.

    Keys that become equal are told apart by a checksum of the original ones.
    """
    plain = {pair.key: re.sub(r"[^A-Za-z0-9_-]", "_", pair.key) for pair in pairs}
    count = Counter(plain.values())
    told = {k: f"{p}-{zlib.crc32(ascii(k).encode()):08x}" if count[p] > 1 else p for k, p in plain.items()}
    safe = [replace(pair, key=told[pair.key]) for pair in pairs]
    owners: dict[str, str] = {}
    for pair in safe:
        if pair.key in owners:
            raise ValueError(f"{owners[pair.key]} and {pair.image} get the same key {pair.key!r}; rename one of them.")
        owners[pair.key] = pair.image
    return safe


def _finish(output: Path, reports: Sequence[ChunkReport], converter: Converter, settings: dict[str, Any]) -> ShardIndex:
    tars = [tar.name for report in reports for tar in report.tars]
    for stale in {path.name for path in output.glob("shard-*.tar")} - set(tars):  # their pairs were mended since
        (output / stale).unlink()
    making, parts, first = output / MAKING_FOLDER, [], 0
    for report in reports:
        parts.append((first, making / report.records.name))
        first += len(report.tars)
    samples = join_records(parts, making / "samples.npy")
    about = {"dataset": converter.name, "settings": settings}
    classes = converter.classes.plain if converter.classes else None
    return finish_index(output, samples, shards=[output / tar for tar in tars], classes=classes, **about)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `iccld shards make`."""
    add, default = parser.add_argument, MakeShardsConfig
    names = ", ".join(DATASETS)
    add("--dataset", required=True, metavar="NAME", help=f"layout and ids of the input: {names}, or a YAML file")
    add("--input", required=True, metavar="PATH", help="the folder as its distributor lays it out, or its zip")
    add("--output", required=True, metavar="DIR", help="where the shards and their index go")
    add("--split", default=default.split, help="train, val, ...; where the set has splits")
    add("--no-labels", action="store_true", help="a target set: label files are not read")
    add(
        "--classes",
        default=default.classes,
        metavar="FILE",
        help=f"a YAML of classes (docs/own-data.md); {CITYSCAPES}: its train ids",
    )
    add(
        "--mapping",
        default=default.mapping,
        metavar="FILE",
        help="a YAML of {id: name of a class}, or of {id: train id}",
    )
    add("--max-side", type=int, default=default.max_side, metavar="N", help="shrink images whose longer side exceeds N")
    add("--size", default="", metavar="HxW", help="resize every image to this size")
    formats = "png and webp lose nothing; keep copies files that are not resized"
    choices = [f.value for f in ImageFormat]
    add("--image-format", default=default.image_format.value, choices=choices, help=f"default: %(default)s; {formats}")
    add("--quality", type=int, default=default.quality, metavar="N", help="of JPEG; default: %(default)s")
    add("--samples-per-shard", type=int, default=default.samples_per_shard, metavar="N", help="default: %(default)s")
    add("--bytes-per-shard", default="0", metavar="SIZE", help="close shards before this size, too, as in 256M or 1G")
    add("--accept-bad", action="store_true", help="finish without the bad pairs")
    add("--workers", type=int, default=usable_cpus(), dest="num_workers", metavar="N", help="default: %(default)s")


def run(arguments: Namespace) -> int:
    """Make the shards and list what is bad; return the exit status. Raises ValueError if the user erred."""
    fields = vars(arguments).copy()
    fields["height"], fields["width"] = _parse_size(fields["size"])
    fields["bytes_per_shard"] = _parse_bytes(fields["bytes_per_shard"])
    fields["image_format"] = ImageFormat(fields["image_format"])
    config = MakeShardsConfig(**{name: fields[name] for name in MakeShardsConfig.__dataclass_fields__})
    try:
        result = make_shards(config)
    except UntoldIdsError as error:
        print(error.yaml)
        raise
    for problem in result.problems:
        print(f"bad: {problem}", file=sys.stderr)
    if result.index is None:
        print(f"{len(result.problems)} bad pairs: {config.output} is not finished.", file=sys.stderr)
        return 1
    print(f"{config.output}: {len(result.index)} samples, {result.index.header.settings['left_out']} pairs left out.")
    return 0


def _parse_size(text: str) -> tuple[int, int]:
    if not text:
        return 0, 0
    match = re.fullmatch(r"([1-9]\d{0,17})x([1-9]\d{0,17})", text)
    if not match:
        raise ValueError(f"--size {text} must be HEIGHTxWIDTH in pixels, as in 512x1024.")
    return int(match[1]), int(match[2])


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not match:
        raise ValueError(f"--bytes-per-shard {text} must be a number of bytes, as in 256M or 1G.")
    return int(match[1]) * _UNITS[match[2]]
