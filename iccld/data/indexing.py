"""Builds the index of a folder of tars by reading each of them once, whoever made them.

a.tar ── index_shard ── indexing/000000.npy ─┐
b.tar ── index_shard ── indexing/000001.npy ─┼── samples ── index/, which appears whole or not at all
...                                          ─┘
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from iccld.data.decode import IMAGE_EXTENSIONS, LABEL_EXTENSION
from iccld.data.index import INDEX_FOLDER, ShardIndex
from iccld.data.processes import Progress, in_processes, say, usable_cpus
from iccld.data.reader import MAX_SAMPLE_BYTES
from iccld.data.records import finish_index, join_records, make_record, to_array, without_conflicts
from iccld.data.sample import examine
from iccld.data.tars import LEAVE_OUT, Place, Problem, Unusable, key_fault, read_members
from iccld.data.work_folder import MAKING_FOLDER, alone_in, clear
from iccld.durable import create

_AGAIN = f"pack it again, {LEAVE_OUT}"


@dataclass(frozen=True)
class IndexResult:
    """The opened set, or None where there are problems that were not accepted; and all problems."""

    index: ShardIndex | None
    problems: list[Problem]


def build_index(
    folder: str | Path,
    *,
    dataset: str = "",
    settings: Mapping[str, Any] | None = None,
    num_workers: int = 1,
    accept_bad: bool = False,
    image_extension: str = "",
    label_extension: str = LABEL_EXTENSION,
    progress: Callable[[str], None] = say,
) -> IndexResult:
    """Indexes all tars of `folder`; the index appears whole, or not at all where problems are not accepted.

    Without `image_extension`, any of IMAGE_EXTENSIONS is taken; with "" for `label_extension`, labels are not. Raises
    ValueError where there is nothing to index, or an index already.
    """
    folder = Path(folder)
    _check_free(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ValueError(f"{folder}: there are no .tar files to index.")
    with alone_in(folder, "indexing") as work:
        clear(work)
        _check_free(folder)  # again: another process may have finished before this one got in
        task = partial(_index_to, work, image_extension.lower(), label_extension.lower())
        problems = _index_all(shards, task, num_workers, progress)
        parts = [(0, work / f"{number}.npy") for number in range(len(shards))]
        samples, conflicts = without_conflicts(join_records(parts, work / "samples.npy"), shards)
        problems += conflicts
        accepted = len(samples) and (accept_bad or not problems)
        if not len(samples) and not problems:
            raise ValueError(f"{folder}: its {len(shards)} tars hold no samples.")
        about = {**(settings or {}), "left_out": len(problems)}
        index = finish_index(folder, samples, shards=shards, dataset=dataset, settings=about) if accepted else None
        clear(work)
    return IndexResult(index, problems)


def _check_free(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give the folder of the tars.")
    if os.path.lexists(folder / INDEX_FOLDER):
        raise ValueError(f"{folder / INDEX_FOLDER} is there already; remove it to build it anew.")
    if os.path.lexists(folder / MAKING_FOLDER):
        raise ValueError(f"{folder}: `iccld shards make` has not finished here; give that command again.")


def _index_all(
    shards: Sequence[Path],
    task: Callable[[tuple[int, Path]], tuple[int, int, list[Problem]]],
    num_workers: int,
    progress: Callable[[str], None],
) -> list[Problem]:
    found: dict[int, list[Problem]] = {}
    speed = Progress(sum(shard.stat().st_size for shard in shards), unit="MB", scale=10**6)
    with in_processes(task, num_workers) as map_:
        for number, size, problems in map_(enumerate(shards)):
            found[number] = problems
            rate, bad = speed.advance(size), sum(map(len, found.values()))
            progress(f"{shards[number].name}: {len(found)} of {len(shards)}, {rate}, {bad} bad samples")
    return [problem for number in sorted(found) for problem in found[number]]


def _index_to(
    work: Path, image_extension: str, label_extension: str, task: tuple[int, Path]
) -> tuple[int, int, list[Problem]]:
    number, path = task
    records, problems = index_shard(path, number, image_extension=image_extension, label_extension=label_extension)
    with create(work / f"{number}.npy") as file:
        np.save(file, records, allow_pickle=False)
    return number, path.stat().st_size, problems


def index_shard(
    path: Path, number: int, *, image_extension: str = "", label_extension: str = LABEL_EXTENSION
) -> tuple[np.ndarray, list[Problem]]:
    """The records (`sample_dtype`) of the usable samples of a tar, shard `number` of its set, and all its problems."""
    members, problems = read_members(path)
    images = (image_extension,) if image_extension else tuple(e for e in IMAGE_EXTENSIONS if e != label_extension)
    records = []
    with path.open("rb") as file:
        for key, fields in members.items():
            try:
                places = _places(path, key, fields, images, label_extension)
                data = _read(file, places[0]), _read(file, places[1])
                records.append(make_record(key, places, data, examine(*data), number))
            except Unusable as bad:
                problems.append(bad.problem)
            except (ValueError, MemoryError) as error:
                problems.append(Problem(str(path), str(error) or "memory does not suffice for it", _AGAIN, key))
    return to_array(records), problems


def _read(file: BinaryIO, place: Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)


def _places(
    path: Path, key: str, fields: Mapping[str, Place], images: Sequence[str], label_extension: str
) -> tuple[Place, Place]:
    """Where the sample's image and label lie; a label of size 0 is none."""
    found = [fields[extension] for extension in images if extension in fields]
    label = fields.get(label_extension) if label_extension else None
    if fault := key_fault(key):
        raise Unusable(Problem(str(path), fault, f"rename it, {LEAVE_OUT}", key))
    if not found:
        what = f"it has no image ({', '.join(images)}), only {', '.join(sorted(fields))}"
        raise Unusable(Problem(str(path), what, f"add one, or name it by --image-extension, {LEAVE_OUT}", key))
    if label and not label.size:
        raise Unusable(Problem(str(path), "its label is empty", _AGAIN, key))
    places = found[0], label or Place(0, 0)
    size = sum(place.size for place in places)
    if size > MAX_SAMPLE_BYTES:
        what = f"it has {size} bytes, {MAX_SAMPLE_BYTES} at most"
        raise Unusable(Problem(str(path), what, f"pack smaller images, {LEAVE_OUT}", key))
    return places


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of `iccld shards index`."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="a folder of tars, each with KEY.jpg (or png, webp) and KEY.label.png")
    add("--dataset", default="", help="a name for the set")
    add("--image-extension", default="", metavar="EXT", help="of images, where a sample has several")
    add("--label-extension", default=LABEL_EXTENSION, metavar="EXT", help="of label images, which hold train ids")
    add("--no-labels", action="store_true", help="a target set: labels are not looked at")
    add("--accept-bad", action="store_true", help="leave out bad samples")
    add("--workers", type=int, default=usable_cpus(), dest="num_workers", help="default: %(default)s")


def run(arguments: Namespace) -> int:
    """Indexes and lists what is bad; the exit status. Raises ValueError where the user erred."""
    result = build_index(
        arguments.folder,
        dataset=arguments.dataset,
        num_workers=arguments.num_workers,
        accept_bad=arguments.accept_bad,
        image_extension=arguments.image_extension,
        label_extension="" if arguments.no_labels else arguments.label_extension,
    )
    for problem in result.problems:
        print(f"bad: {problem}", file=sys.stderr)
    if result.index is None:
        print(f"{len(result.problems)} problems: {arguments.folder} is not indexed.", file=sys.stderr)
        return 1
    print(f"{arguments.folder}: {len(result.index)} samples indexed, {len(result.problems)} problems.")
    return 0
