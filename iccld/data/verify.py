"""Reads a whole set once, and names what is not as its index says."""

import bisect
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iccld.data import integrity
from iccld.data.index import ShardIndex
from iccld.data.open_index import open_index
from iccld.data.processes import Progress, in_processes, say, usable_cpus
from iccld.data.reader import BadSample, ShardReader
from iccld.data.records import examine
from iccld.data.storage import MissingShard, StorageConfig, StorageError, open_storage
from iccld.data.tars import Members, Place, Problem, read_members
from iccld.redact import without_secrets

STORAGE = StorageConfig(retry_for_s=30.0)
"""Of commands that someone waits for, unlike a training run."""
_RESTORE = "restore it, or make it and the index again"


@dataclass(frozen=True)
class VerifyResult:
    """How much was read (`num_bytes` of samples), and all that is broken, in the order of the shards."""

    num_samples: int
    num_bytes: int
    problems: list[Problem]


@dataclass(frozen=True)
class ShardReport:
    """What became of one shard."""

    shard: int
    num_samples: int
    num_bytes: int
    problems: list[Problem]


def verify_shards(location: str | Path, *, num_workers: int = 1, progress: Callable[[str], None] = say) -> VerifyResult:
    """Checks the index's files, the sizes of the tars, and of every sample its place, checksums, decoding and facts.

    In a folder, the tars' headers are checked, too: readers without our index go by them.
    Raises ValueError where there is no index to check against.
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
    for shard in range(count):
        problems += reports[shard].problems
    num_bytes = sum(report.num_bytes for report in reports.values())
    return VerifyResult(len(index), num_bytes, problems)


def _check_index(index: ShardIndex) -> list[Problem]:
    return [Problem(str(path), what, index.remedy) for path, what in integrity.faults(index)]


@dataclass(frozen=True)
class ShardVerifier:
    """Checks the shards that `reader` reads, each by its number."""

    reader: ShardReader

    def __call__(self, shard: int) -> ShardReport:
        """Reads all samples of a shard."""
        index, name = self.reader.index, self.reader.index.shard_name(shard)
        where, expected = self.reader.storage.describe(name), int(index.shards["size"][shard])
        positions = _positions(index, shard)
        try:
            size = self.reader.storage.size(name)
        except MissingShard:
            return ShardReport(shard, len(positions), 0, [Problem(where, "it is missing", _RESTORE)])
        what = f"it has {size} bytes, its index says {expected}"
        problems = [] if size == expected else [Problem(where, what, _RESTORE)]
        members, damage = self._headers(name) if not problems else (None, [])
        problems, num_bytes = problems + damage, 0
        for position in positions:
            record = index.samples[position]
            num_bytes += int(record["image_size"]) + int(record["label_size"])
            if fault := self._fault(position, record, size) or _misplaced(index.key(position), record, members):
                problems.append(Problem(where, fault, _RESTORE, index.key(position)))
        return ShardReport(shard, len(positions), num_bytes, problems)

    def _headers(self, name: str) -> tuple[Members | None, list[Problem]]:
        """What the tar's own headers say; None of a tar that is not whole, or not to be had without fetching all."""
        storage = self.reader.storage
        if not storage.is_local:
            return None, []
        try:
            members, problems = read_members(Path(storage.location) / name)
        except OSError as error:
            return None, [Problem(storage.describe(name), f"it cannot be read ({error.strerror})", _RESTORE)]
        # Those of a key are of members that the index leaves out.
        damage = [Problem(problem.file, problem.what, _RESTORE) for problem in problems if not problem.key]
        return None if damage else members, damage

    def _fault(self, position: int, record: np.void, shard_bytes: int) -> str:
        """What is wrong with a sample; empty if nothing is."""
        ends = [int(record[f"{kind}_offset"]) + int(record[f"{kind}_size"]) for kind in ("image", "label")]
        if max(ends) > shard_bytes:
            return f"its index places it beyond the shard's {shard_bytes} bytes"
        try:
            sample = self.reader.read(position, with_labels=bool(record["label_size"]))
            height, width, class_pixels = examine(sample.image, sample.label)
        except BadSample as bad:
            return bad.what
        except ValueError as error:
            return str(error)
        except StorageError as error:
            if not self.reader.storage.is_local:  # a network that fails says nothing of the sample
                raise
            return str(error)
        if (height, width) != (record["height"], record["width"]):
            return f"it has {height}x{width} pixels, its index says {record['height']}x{record['width']}"
        if not np.array_equal(class_pixels, record["class_pixels"]):
            return "its label has other class pixels than its index says"
        return ""


def _misplaced(key: str, record: np.void, members: Members | None) -> str:
    """What is wrong with a sample for readers that go by the tar's headers; empty if nothing is."""
    if members is None:
        return ""
    places = [Place(int(record[f"{kind}_offset"]), int(record[f"{kind}_size"])) for kind in ("image", "label")]
    found = members.get(key, {}).values()
    there = all(place in found for place in places if place.size)
    return "" if there else "the tar has no members of this key where its index says"


def _positions(index: ShardIndex, shard: int) -> range:
    """Where a shard's samples are in the index; found without reading all of it."""
    shards, numbers = index.samples["shard"], range(len(index))
    return range(*(bisect.bisect_left(numbers, shard + end, key=lambda i: int(shards[i])) for end in (0, 1)))


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of `iccld shards verify`."""
    parser.add_argument("location", metavar="DIR_OR_URL", help="a set of shards with its index")
    parser.add_argument("--workers", type=int, default=usable_cpus(), dest="num_workers", metavar="N")


def run(arguments: Namespace) -> int:
    """Verifies and lists what is broken; the exit status. Raises ValueError where the user erred."""
    result = verify_shards(arguments.location, num_workers=arguments.num_workers)
    for problem in result.problems:
        print(f"broken: {problem}", file=sys.stderr)
    verdict = f"{len(result.problems)} problems" if result.problems else "all as indexed"
    read = f"{result.num_samples} samples, {result.num_bytes / 1e6:,.1f} MB"
    print(f"{without_secrets(arguments.location)}: {read}: {verdict}.")
    return 1 if result.problems else 0
