"""Packs a data set into shards: plain WebDataset tars of images and labels of train ids, and their index.

    images, labels ── converter ── pairs ─┬─ chunk ── shard-000000.tar ─┐
                                          ├─ chunk ── shard-000001.tar ─┼── index/ (last: it says that all is done)
                                          └─ ...                       ─┘

Shard i holds the i-th chunk of the sorted pairs, without the bad ones. `making/` remembers what is finished, so that
the same command goes on where it was interrupted.
"""

import json
import re
import shutil
import sys
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from iccld.data.converters import CONVERTERS, Converter, Pair
from iccld.data.index import ShardIndex
from iccld.data.indexing import build_index, sync
from iccld.data.packing import ImageFormat, Packing, Problem, pack_shard


@dataclass
class MakeShardsConfig:
    """Settings of `iccld shards make`. At most one of `max_side` and `height` x `width` resizes; 0 is off."""

    dataset: str
    input: str
    output: str
    split: str = ""
    no_labels: bool = False
    mapping: str = ""
    max_side: int = 0
    height: int = 0
    width: int = 0
    image_format: ImageFormat = ImageFormat.JPG
    quality: int = 95
    samples_per_shard: int = 1000
    accept_bad: bool = False

    def __post_init__(self) -> None:
        if self.dataset not in CONVERTERS:
            raise ValueError(f"--dataset {self.dataset} is unknown; use one of {', '.join(CONVERTERS)}.")
        if self.mapping and not CONVERTERS[self.dataset].takes_mapping:
            raise ValueError(f"--mapping {self.mapping}: the ids of {self.dataset} are known; leave --mapping out.")
        if min(self.max_side, self.height, self.width) < 0 or bool(self.height) != bool(self.width):
            raise ValueError("--max-side and --size must be positive; give --size as HEIGHTxWIDTH, as in 512x1024.")
        if self.max_side and self.height:
            raise ValueError(f"--max-side {self.max_side} and --size exclude each other; leave one out.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality} must be between 1 and 100; 95 is usual.")
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard {self.samples_per_shard} must be at least 1; 1000 is usual.")

    def settings(self) -> dict[str, Any]:
        """What the shards' content depends on, as JSON."""
        own = asdict(self) | {"image_format": self.image_format.value, "input": str(Path(self.input).resolve())}
        return {name: value for name, value in own.items() if name not in ("output", "accept_bad", "mapping")}


@dataclass(frozen=True)
class MakeShardsResult:
    """The opened set, or None where it is not finished: bad pairs were found and not accepted, or no others."""

    index: ShardIndex | None
    problems: list[Problem]


def make_shards(config: MakeShardsConfig, *, progress: Callable[[str], None] = print) -> MakeShardsResult:
    """Makes the shards of a data set; the same command again keeps what is finished."""
    root, output = Path(config.input), Path(config.output)
    if not root.is_dir():
        raise ValueError(f"--input {root}: there is no such folder; give the folder that holds the data set.")
    converter = CONVERTERS[config.dataset].open(root, config.split, Path(config.mapping) if config.mapping else None)
    settings = config.settings() | {"ids": {str(old): new for old, new in sorted(converter.ids.items())}}
    if (output / "index").is_dir():
        return _keep_finished(output, settings, progress)
    pairs = _with_safe_keys(converter.pairs())
    _prepare(output, settings, pairs)
    problems = _pack_all(pairs, converter, config, progress)
    if len(problems) == len(pairs) or (problems and not config.accept_bad):
        return MakeShardsResult(None, problems)
    index = build_index(output, dataset=config.dataset, settings=settings)
    shutil.rmtree(output / "making")
    return MakeShardsResult(index, problems)


def _keep_finished(output: Path, settings: dict[str, Any], progress: Callable[[str], None]) -> MakeShardsResult:
    index = ShardIndex.open(output, setting="--output")
    _check_same(index.header.settings, settings, output)
    shutil.rmtree(output / "making", ignore_errors=True)
    progress(f"{output} is finished already with these settings: {len(index)} samples are kept.")
    return MakeShardsResult(index, [])


def _check_same(old: dict[str, Any], new: dict[str, Any], output: Path) -> None:
    different = [f"{name} (was {old.get(name)}, is {new[name]})" for name in new if old.get(name) != new[name]]
    if different:
        raise ValueError(
            f"--output {output} holds shards made with other settings: {', '.join(different)}; "
            f"use another --output, or remove the folder to make them anew."
        )


def _prepare(output: Path, settings: dict[str, Any], pairs: Sequence[Pair]) -> None:
    """Leaves `output` empty but for what an interrupted run of the same settings and pairs has finished."""
    marker = output / "making" / "settings.json"
    state = {"settings": settings, "pairs": zlib.crc32("\n".join(pair.key for pair in pairs).encode())}
    if marker.is_file():
        old = json.loads(marker.read_text())
        _check_same(old["settings"], settings, output)
        if old == state:
            return
        shutil.rmtree(marker.parent)
        for shard in output.glob("shard-*.tar"):
            shard.unlink()
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} is not empty and was not made by this command; use another --output.")
    marker.parent.mkdir(parents=True)
    _write_json(marker, state)


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    sync(temporary)
    temporary.rename(path)


def _with_safe_keys(pairs: Sequence[Pair]) -> list[Pair]:
    """Keys without dots, slashes and the like, which WebDataset readers would take for something else."""
    safe = [replace(pair, key=re.sub(r"[^A-Za-z0-9_-]", "_", pair.key)) for pair in pairs]
    owners: dict[str, Path] = {}
    for pair in safe:
        if pair.key in owners:
            raise ValueError(f"{owners[pair.key]} and {pair.image} get the same key {pair.key!r}; rename one of them.")
        owners[pair.key] = pair.image
    return safe


def _packing(pairs: Sequence[Pair], config: MakeShardsConfig) -> Packing:
    extension, keep = config.image_format.value, config.image_format is ImageFormat.KEEP
    if keep:
        found = {pair.image.suffix.lower().replace("jpeg", "jpg")[1:] for pair in pairs}
        if found not in ({"jpg"}, {"png"}):
            raise ValueError(
                f"--image-format keep: the images are {', '.join(sorted(found))}, but a set has one format, jpg or "
                f"png; use --image-format jpg or png."
            )
        extension = found.pop()
    size = (config.height, config.width) if config.height else None
    return Packing(extension, keep, config.quality, not config.no_labels, config.max_side, size)


def _pack_all(
    pairs: Sequence[Pair], converter: Converter, config: MakeShardsConfig, progress: Callable[[str], None]
) -> list[Problem]:
    packing, problems = _packing(pairs, config), []
    starts = range(0, len(pairs), config.samples_per_shard)
    for number, start in enumerate(starts):
        path = Path(config.output) / f"shard-{number:06d}.tar"
        report = path.parent / "making" / f"{path.stem}.json"
        known = [Problem(**problem) for problem in json.loads(report.read_text())] if report.is_file() else None
        if known is None or (known and not config.accept_bad):  # who did not accept them may have mended them
            known = pack_shard(path, pairs[start : start + config.samples_per_shard], converter, packing)
            _write_json(report, [asdict(problem) for problem in known])
        problems += known
        progress(f"{path.name}: {number + 1} of {len(starts)}, {len(problems)} bad pairs so far")
    return problems


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of `iccld shards make`."""
    add, default = parser.add_argument, MakeShardsConfig
    add("--dataset", required=True, choices=sorted(CONVERTERS), help="the layout and the ids of the input")
    add("--input", required=True, metavar="DIR", help="the folder as its distributor lays it out")
    add("--output", required=True, metavar="DIR", help="where the shards and their index go")
    add("--split", default=default.split, help="train, val, ...; where the set has splits")
    add("--no-labels", action="store_true", help="a target set: label files are not read")
    add("--mapping", default=default.mapping, metavar="FILE", help="folder: JSON or YAML of {id: train id}")
    add("--max-side", type=int, default=default.max_side, metavar="N", help="shrink images whose longer side exceeds N")
    add("--size", default="", metavar="HxW", help="resize every image to this size")
    add("--image-format", default=default.image_format.value, choices=[f.value for f in ImageFormat])
    add("--quality", type=int, default=default.quality, help="of JPEG; default: %(default)s")
    add("--samples-per-shard", type=int, default=default.samples_per_shard, help="default: %(default)s")
    add("--accept-bad", action="store_true", help="finish without the bad pairs")


def run(arguments: Namespace) -> int:
    """Makes the shards and lists what is bad; the exit status. Raises ValueError where the user erred."""
    fields = vars(arguments).copy()
    size = re.fullmatch(r"(\d+)x(\d+)", text) if (text := fields.pop("size")) else None
    if text and not size:
        raise ValueError(f"--size {text} must be HEIGHTxWIDTH in pixels, as in 512x1024.")
    height, width = (int(side) for side in size.groups()) if size else (0, 0)
    fields |= {"height": height, "width": width, "image_format": ImageFormat(fields["image_format"])}
    config = MakeShardsConfig(**{name: fields[name] for name in MakeShardsConfig.__dataclass_fields__})
    result = make_shards(config)
    for problem in result.problems:
        print(f"bad: {problem}", file=sys.stderr)
    if result.index is None:
        print(f"{len(result.problems)} bad pairs: {config.output} is not finished.", file=sys.stderr)
        return 1
    print(f"{config.output}: {len(result.index)} samples, {len(result.problems)} pairs left out.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command on its own, with its errors in one line."""
    parser = ArgumentParser(prog="make_shards", description="Pack a data set into shards for training.")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
