"""Reading of a whole set, once, to name everything that differs from its index."""

import bisect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from iccld.data.processes import Progress, in_processes, say, usable_cpus
from iccld.data.sample import examine
from iccld.data.shards.tally import Tally, plain
from iccld.data.shards.tar_folder import TarFolder, look_into
from iccld.data.shards.tars import Fault, Members, Place, Problem, read_members
from iccld.data.storage import integrity
from iccld.data.storage.base import MissingShard, StorageConfig, StorageError
from iccld.data.storage.index import INDEX_FOLDER, ShardIndex
from iccld.data.storage.open import open_storage
from iccld.data.storage.open_index import open_index
from iccld.data.storage.reader import BadSample, ShardReader
from iccld.redact import without_secrets

STORAGE = StorageConfig(retry_for_s=30.0)
"""Retries end sooner than in a training run: a person waits for these commands."""
_RESTORE = "restore it, or make it and the index again"
_UNKNOWN = "samples of the tars that are not in the index"


@dataclass(frozen=True)
class VerifyResult:
    """Numbers of what was read (`num_bytes` of samples), and all problems, in the order of the shards."""

    num_samples: int
    num_bytes: int
    problems: list[Problem]
    passed_over: Tally


@dataclass(frozen=True)
class ShardReport:
    """Result of one shard."""

    shard: int
    num_samples: int
    num_bytes: int
    problems: list[Problem]
    passed_over: Tally = field(default_factory=Tally)


def verify_shards(location: str | Path, *, num_workers: int = 1, progress: Callable[[str], None] = say) -> VerifyResult:
    """Check the index's files, the tars' sizes, and each sample's place, checksums, pixels and facts.

    In a folder, the tars' headers are checked, too, since readers without our index go by them. Tars that the index
    does not know, and samples that were not left out on purpose, are problems as well. Raises ValueError if there is no
    index to check against.
    """
    storage = open_storage(str(location), STORAGE)
    index = open_index(storage, str(location), setting="shards")
    problems, reports = _check_index(index), dict[int, ShardReport]()
    speed, count = Progress(len(index)), len(index.shards)
    with in_processes(ShardVerifier(ShardReader(index, storage)), num_workers) as map_:
        for report in map_(range(count)):
            reports[report.shard] = report
            rate, bad = speed.advance(report.num_samples), sum(len(each.problems) for each in reports.values())
            progress(f"{index.shard_name(report.shard)}: {len(reports)} of {count}, {rate}, {bad} problems")
    in_order = [reports[shard] for shard in range(count)]
    problems += [problem for report in in_order for problem in report.problems]
    beside = _look_beside(Path(storage.location), index) if storage.is_local else TarFolder()
    passed_over = beside.passed_over.update(report.passed_over for report in in_order)
    problems += beside.problems
    problems += [] if problems else _too_many_unknown(index, passed_over)  # the problems above may be the reason
    return VerifyResult(len(index), sum(report.num_bytes for report in in_order), problems, passed_over)


def _look_beside(folder: Path, index: ShardIndex) -> TarFolder:
    """Find what lies beside the tars that the index knows."""
    found, known = look_into(folder), {index.shard_name(shard) for shard in range(len(index.shards))}
    for path in found.tars:
        if path.name not in known:
            remedy = f"remove {INDEX_FOLDER}/ and index the set again, or move it away"
            found.problems.append(Problem(str(path), "its index does not know this tar", remedy))
    for path in found.unfinished:
        remedy = "wait for it, give it again, or remove this folder"
        found.problems.append(Problem(str(path), "a command has not finished here", remedy))
    return found


def _too_many_unknown(index: ShardIndex, passed_over: Tally) -> list[Problem]:
    """Return a problem if the tars have more samples outside the index than it says were left out."""
    (count, example), left_out = passed_over.kinds.get(_UNKNOWN, (0, "")), index.header.settings.get("left_out")
    if not isinstance(left_out, int) or count <= left_out:  # an index made earlier does not say how many
        return []
    what = f"it lacks {count} samples of the tars, such as {plain(example)}, of which it left out {left_out} knowingly"
    return [Problem(str(index.folder), what, f"remove {INDEX_FOLDER}/ and index the set again")]


def _check_index(index: ShardIndex) -> list[Problem]:
    return [Problem(str(path), what, index.remedy) for path, what in integrity.faults(index)]


@dataclass(frozen=True)
class ShardVerifier:
    """Verifies the shards that `reader` reads, each by its number."""

    reader: ShardReader

    def __call__(self, shard: int) -> ShardReport:
        """Read and check all samples of a shard."""
        index, name = self.reader.index, self.reader.index.shard_name(shard)
        where, expected = self.reader.storage.describe(name), int(index.shards["size"][shard])
        positions = _positions(index, shard)
        try:
            size = self.reader.storage.size(name)
        except MissingShard:
            return ShardReport(shard, len(positions), 0, [Problem(where, "it is missing", _RESTORE)])
        what = f"it has {size} bytes, its index says {expected}"
        problems = [] if size == expected else [Problem(where, what, _RESTORE)]
        members, damage, passed_over = self._headers(name) if not problems else (None, [], Tally())
        problems, num_bytes = problems + damage, 0
        for position in positions:
            record, key = index.samples[position], index.key(position)
            num_bytes += int(record["image_size"]) + int(record["label_size"])
            unused, misplaced = _compare(record, members.pop(key, {})) if members is not None else ([], "")
            if fault := self._fault(position, record, size) or misplaced:
                problems.append(Problem(where, fault, _RESTORE, key))
            for extension in unused if not misplaced else []:
                passed_over.add("members that the index does not use", f"{name}: {key}.{extension}")
        for key in members or {}:
            passed_over.add(_UNKNOWN, f"{name}: {key}")
        return ShardReport(shard, len(positions), num_bytes, problems, passed_over)

    def _headers(self, name: str) -> tuple[Members | None, list[Problem], Tally]:
        """Read the tar's own headers; None if the tar is not whole or could only be fetched as a whole."""
        storage = self.reader.storage
        if not storage.is_local:
            return None, [], Tally()
        try:
            members, problems, passed_over = read_members(Path(storage.location) / name)
        except (OSError, ValueError) as error:
            what = f"it cannot be read ({getattr(error, 'strerror', None) or error})"
            return None, [Problem(storage.describe(name), what, _RESTORE)], Tally()
        # Those of a key are of members that the index leaves out.
        damage = [Problem(problem.file, problem.what, _RESTORE) for problem in problems if not problem.key]
        return None if damage else members, damage, passed_over

    def _fault(self, position: int, record: np.void, shard_bytes: int) -> str:
        """Say what is wrong with a sample; "" if nothing is."""
        ends = [int(record[f"{kind}_offset"]) + int(record[f"{kind}_size"]) for kind in ("image", "label")]
        if max(ends) > shard_bytes:
            return f"its index places it beyond the shard's {shard_bytes} bytes"
        try:
            sample = self.reader.read(position, with_labels=bool(record["label_size"]))
            height, width, class_pixels = examine(sample.image, sample.label, num_classes=self.reader.index.num_classes)
        except BadSample as bad:
            return bad.what
        except ValueError as error:
            return str(error)
        except StorageError as error:
            if not self.reader.storage.is_local:  # a failed connection proves nothing about the sample
                raise
            return str(error)
        if (height, width) != (record["height"], record["width"]):
            return f"it has {height}x{width} pixels, its index says {record['height']}x{record['width']}"
        if not np.array_equal(class_pixels, record["class_pixels"]):
            return "its label has other class pixels than its index says"
        return ""


def _compare(record: np.void, fields: Mapping[str, Place | Fault]) -> tuple[list[str], str]:
    """Return the extensions that a sample's record does not name, and what is wrong for readers of headers."""
    places = [Place(int(record[f"{kind}_offset"]), int(record[f"{kind}_size"])) for kind in ("image", "label")]
    there = all(place in fields.values() for place in places if place.size)
    unused = [extension for extension, place in fields.items() if place not in places]
    return unused, "" if there else "the tar has no members of this key where its index says"


def _positions(index: ShardIndex, shard: int) -> range:
    """Find a shard's samples in the index, without reading all of it."""
    shards, numbers = index.samples["shard"], range(len(index))
    return range(*(bisect.bisect_left(numbers, shard + end, key=lambda i: int(shards[i])) for end in (0, 1)))


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `iccld shards verify`."""
    parser.add_argument("location", metavar="DIR_OR_URL", help="a set of shards with its index")
    parser.add_argument("--workers", type=int, default=usable_cpus(), dest="num_workers", metavar="N")


def run(arguments: Namespace) -> int:
    """Verify and list what is broken; return the exit status. Raises ValueError if the user erred."""
    result = verify_shards(arguments.location, num_workers=arguments.num_workers)
    for problem in result.problems:
        print(f"broken: {problem}", file=sys.stderr)
    for line in result.passed_over.lines():
        print(f"{without_secrets(arguments.location)}: {line}")
    verdict = f"{len(result.problems)} problems" if result.problems else "all as indexed"
    read = f"{result.num_samples} samples, {result.num_bytes / 1e6:,.1f} MB"
    print(f"{without_secrets(arguments.location)}: {read}: {verdict}.")
    return 1 if result.problems else 0
