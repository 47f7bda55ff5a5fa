"""Building of the index of a folder of tars, whoever made them; each tar is read once.

a.tar ── index_shard ── indexing/000000.npy ─┐
b.tar ── index_shard ── indexing/000001.npy ─┼── samples ── index/, which appears whole or not at all
...                                          ─┘
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from iccld.data.classes import CITYSCAPES, ClassList, classes_of, num_classes_of
from iccld.data.images.decode import LABEL_EXTENSION
from iccld.data.processes import Progress, in_processes, say, usable_cpus
from iccld.data.sample import doubts, examine
from iccld.data.shards.records import finish_index, join_records, make_record, to_array, without_conflicts
from iccld.data.shards.roles import Roles
from iccld.data.shards.tally import Tally
from iccld.data.shards.tar_folder import INDEXING_FOLDER, TarFolder, look_into
from iccld.data.shards.tars import LEAVE_OUT, Place, Problem, Unusable, read_members
from iccld.data.shards.work_folder import MAKING_FOLDER, alone_in, clear
from iccld.data.storage.files import open_file
from iccld.data.storage.index import INDEX_FOLDER, ShardIndex
from iccld.durable import create

_AGAIN = f"pack it again, {LEAVE_OUT}"


@dataclass(frozen=True)
class IndexResult:
    """The opened set (None if problems were not accepted), all problems, and what was passed over or is in doubt."""

    index: ShardIndex | None
    problems: list[Problem]
    passed_over: Tally = field(default_factory=Tally)


class IndexedShard(NamedTuple):
    """Records (`sample_dtype`) of a tar's usable samples, all its problems, and what was passed over or is in doubt."""

    records: np.ndarray
    problems: list[Problem]
    passed_over: Tally


@dataclass(frozen=True)
class _Finished:
    """A worker's message about the tar `number`, of `size` bytes, whose records it has left on the disk."""

    number: int
    size: int
    problems: list[Problem]
    passed_over: Tally


def build_index(
    folder: str | Path,
    *,
    dataset: str = "",
    num_workers: int = 1,
    accept_bad: bool = False,
    image_extension: str = "",
    label_extension: str = LABEL_EXTENSION,
    classes: ClassList | None = None,
    progress: Callable[[str], None] = say,
) -> IndexResult:
    """Index all tars of `folder`. The index appears whole, or not at all if problems are not accepted.

    Without `image_extension`, any of IMAGE_EXTENSIONS is an image's; with "" for `label_extension`, the set has no
    labels. Labels hold Cityscapes train ids, or indices of `classes`. Raises ValueError if there is nothing to index,
    or an index already.
    """
    folder = Path(folder)
    _check_free(folder)
    found = look_into(folder)
    if not found.tars and not found.problems:
        raise ValueError(f"{folder}: there are no .tar files to index.")
    with alone_in(folder, INDEXING_FOLDER) as work:
        clear(work)
        _check_free(folder)  # checked again: another process may have finished meanwhile
        task = partial(_index_to, work, image_extension.lower(), label_extension.lower(), num_classes_of(classes))
        problems, passed_over = _index_all(found, task, num_workers, progress)
        parts = [(0, work / f"{number}.npy") for number in range(len(found.tars))]
        samples, conflicts = without_conflicts(join_records(parts, work / "samples.npy"), found.tars)
        problems += conflicts
        accepted = len(samples) and (accept_bad or not problems)
        if not len(samples) and not problems:
            seen = "".join(f"; {line}" for line in passed_over.lines())
            raise ValueError(f"{folder}: its {len(found.tars)} tars hold no samples{seen}.")
        how = {"settings": {"left_out": len(problems)}, "classes": classes.plain if classes else None}
        index = finish_index(folder, samples, dataset=dataset, shards=found.tars, **how) if accepted else None
        clear(work)
    return IndexResult(index, problems, passed_over)


def _check_free(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give the folder of the tars.")
    if os.path.lexists(folder / INDEX_FOLDER):
        raise ValueError(f"{folder / INDEX_FOLDER} is there already; remove it to build it anew.")
    if os.path.lexists(folder / MAKING_FOLDER):
        raise ValueError(f"{folder}: `iccld shards make` has not finished here; give that command again.")


def _index_all(
    found: TarFolder,
    task: Callable[[tuple[int, Path]], _Finished],
    num_workers: int,
    progress: Callable[[str], None],
) -> tuple[list[Problem], Tally]:
    shards, finished = found.tars, dict[int, _Finished]()
    speed = Progress(sum(shard.stat().st_size for shard in shards), unit="MB", scale=10**6)
    with in_processes(task, num_workers) as map_:
        for each in map_(enumerate(shards)):
            finished[each.number] = each
            rate, bad = speed.advance(each.size), sum(len(one.problems) for one in finished.values())
            progress(f"{shards[each.number].name}: {len(finished)} of {len(shards)}, {rate}, {bad} bad samples")
    in_order = [finished[number] for number in range(len(shards))]
    problems = [*found.problems, *(problem for each in in_order for problem in each.problems)]
    return problems, Tally().update([found.passed_over, *(each.passed_over for each in in_order)])


def _index_to(
    work: Path, image_extension: str, label_extension: str, num_classes: int, task: tuple[int, Path]
) -> _Finished:
    number, path = task
    extensions = {"image_extension": image_extension, "label_extension": label_extension}
    shard = index_shard(path, number, num_classes=num_classes, **extensions)
    with create(work / f"{number}.npy") as file:
        np.save(file, shard.records, allow_pickle=False)
    return _Finished(number, path.stat().st_size, shard.problems, shard.passed_over)


def index_shard(
    path: Path,
    number: int,
    *,
    image_extension: str = "",
    label_extension: str = LABEL_EXTENSION,
    num_classes: int,
) -> IndexedShard:
    """Index a tar, shard `number` of its set: read and examine each of its samples."""
    try:
        samples, problems, passed_over = read_members(path)
        with open_file(path) as file:
            roles = Roles(path, image_extension, label_extension)
            records = []
            for key, fields in samples.items():
                try:
                    places = roles.places(key, fields, passed_over)
                    data = _read(file, places[0]), _read(file, places[1])
                    facts = examine(*data, num_classes=num_classes)
                    records.append(make_record(key, places, data, facts, number))
                    for doubt in doubts(*data, facts[-1]) if data[1] else ():
                        passed_over.add(doubt, f"{path.name}: {key}")
                except Unusable as bad:
                    problems.append(bad.problem)
                except (ValueError, MemoryError) as error:
                    problems.append(Problem(str(path), str(error) or "memory does not suffice for it", _AGAIN, key))
    except (OSError, ValueError) as error:
        what = f"it cannot be read ({getattr(error, 'strerror', None) or error})"
        return IndexedShard(
            to_array([], num_classes=num_classes), [Problem(str(path), what, f"make it readable, {LEAVE_OUT}")], Tally()
        )
    return IndexedShard(to_array(records, num_classes=num_classes), problems, passed_over)


def _read(file: BinaryIO, place: Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `iccld shards index`."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="a folder of tars, each with KEY.jpg (or png, webp) and KEY.label.png")
    add("--dataset", default="", help="a name for the set")
    add("--image-extension", default="", metavar="EXT", help="of images, where a sample has several")
    add("--label-extension", default=LABEL_EXTENSION, metavar="EXT", help="of label images, which hold class ids")
    add("--classes", default=CITYSCAPES, metavar="FILE", help="a YAML: labels hold its indices; default: train ids")
    add("--no-labels", action="store_true", help="a target set: labels are not looked at")
    add("--accept-bad", action="store_true", help="leave out bad samples")
    add("--workers", type=int, default=usable_cpus(), dest="num_workers", help="default: %(default)s")


def run(arguments: Namespace) -> int:
    """Build the index and list what is bad; return the exit status. Raises ValueError if the user erred."""
    result = build_index(
        arguments.folder,
        dataset=arguments.dataset,
        num_workers=arguments.num_workers,
        accept_bad=arguments.accept_bad,
        image_extension=arguments.image_extension,
        label_extension="" if arguments.no_labels else arguments.label_extension,
        classes=classes_of(arguments.classes),
    )
    for problem in result.problems:
        print(f"bad: {problem}", file=sys.stderr)
    for line in result.passed_over.lines():
        print(f"{arguments.folder}: {line}")
    if result.index is None:
        print(f"{len(result.problems)} problems: {arguments.folder} is not indexed.", file=sys.stderr)
        return 1
    if not arguments.no_labels and not result.index.header.has_labels:
        print(f"{arguments.folder}: no sample has a label (KEY.{arguments.label_extension}).")
    print(f"{arguments.folder}: {len(result.index)} samples indexed, {len(result.problems)} problems.")
    return 0
