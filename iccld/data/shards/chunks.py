"""Packing of a chunk of pairs: tars, their part of the index, and a report that a restart can check.

Chunk 3 becomes shard-000003.tar; with a limit of bytes, shard-000003-000.tar, shard-000003-001.tar, ... The stored
bytes depend on the chunk alone.
"""

import contextlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from iccld.data.images.decode import LABEL_EXTENSION
from iccld.data.processes import Progress, in_processes
from iccld.data.shards.converters import Converter, Pair
from iccld.data.shards.packing import PackedPair, Packing, pack_pair
from iccld.data.shards.records import make_record, to_array
from iccld.data.shards.tally import Tally
from iccld.data.shards.tars import Place, Problem, Unusable
from iccld.data.shards.work_folder import MAKING_FOLDER
from iccld.data.storage.index import file_crc32
from iccld.durable import create, sync, write_whole
from iccld.reading import MIB, read_json


@dataclass(frozen=True)
class FileState:
    """Finished file: its name, its size in bytes, and its CRC-32."""

    name: str
    size: int
    checksum: int

    @classmethod
    def of(cls, path: Path) -> "FileState":
        return cls(path.name, path.stat().st_size, file_crc32(path))

    def is_that_of(self, path: Path) -> bool:
        """Tell whether the file is there and has these bytes."""
        return path.is_file() and path.stat().st_size == self.size and file_crc32(path) == self.checksum


@dataclass(frozen=True)
class ChunkReport:
    """Result of chunk `number`: its tars, in order, its part of the index, and the pairs that are left out.

    `inputs` is a checksum of the versions of the files that it was made from, and `noted` counts what the user may not
    expect of the others; reports of earlier programs have neither.
    """

    number: int
    num_pairs: int
    tars: list[FileState]
    records: FileState
    problems: list[Problem]
    inputs: int | None = None
    noted: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class ChunkPacker:
    """Packs chunks of pairs into tars in `output`; their reports go to `making/` in it."""

    converter: Converter
    packing: Packing
    output: Path

    def __call__(self, chunk: tuple[int, Sequence[Pair]]) -> ChunkReport:
        """Write the tars of a chunk (its number and its pairs), its part of the index and, last, its report."""
        number, pairs = chunk
        inputs = self._inputs(pairs)
        writer, problems = ChunkWriter(self.output, number, self.packing.max_bytes), list[Problem]()
        noted = Tally()
        try:
            for pair in pairs:
                try:
                    packed = pack_pair(pair, self.converter, self.packing)
                    writer.add(pair.key, packed)
                    noted.update([packed.noted])
                except Unusable as bad:
                    problems.append(bad.problem)
            writer.close()
        finally:
            writer.discard()
        sync(self.output)
        records, path = io.BytesIO(), self._path(number, "npy")
        np.save(records, to_array(writer.records, num_classes=self.converter.num_classes), allow_pickle=False)
        write_whole(path, records.getvalue())
        report = ChunkReport(number, len(pairs), writer.tars, FileState.of(path), problems, inputs, noted)
        write_whole(self._path(number, "json"), json.dumps(asdict(report)).encode())
        return report

    def finished(self, chunk: tuple[int, Sequence[Pair]]) -> ChunkReport | None:
        """Return the report of a chunk whose files are all whole, and whose pairs nobody has changed, else None."""
        number, pairs = chunk
        report = self._whole(number)
        return report if report and report.inputs in (None, self._inputs(pairs)) else None

    def _inputs(self, pairs: Sequence[Pair]) -> int:
        """Compute a checksum of what the chunk is made of: the state of images, labels and the list of classes."""
        paths = [path for pair in pairs for path in (pair.image, pair.label if self.packing.with_labels else None)]
        paths += [self.converter.class_list] if self.packing.with_labels else []
        versions = [(path, self.converter.tree.version(path)) for path in paths if path]
        return zlib.crc32(repr(versions).encode())

    def _whole(self, number: int) -> ChunkReport | None:
        try:
            content = read_json(self._path(number, "json"), 64 * MIB)
            content["tars"] = [FileState(**tar) for tar in content["tars"]]
            content["records"] = FileState(**content["records"])
            content["problems"] = [Problem(**problem) for problem in content["problems"]]
            kinds = dict(content.get("noted", {"kinds": {}})["kinds"])
            content["noted"] = Tally({kind: (count, example) for kind, (count, example) in kinds.items()})
            report = ChunkReport(**content)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        whole = report.records.is_that_of(self._path(number, "npy"))
        return report if whole and all(tar.is_that_of(self.output / tar.name) for tar in report.tars) else None

    def _path(self, number: int, extension: str) -> Path:
        return self.output / MAKING_FOLDER / f"{number:06d}.{extension}"


def pack_chunks(
    chunks: Sequence[Sequence[Pair]],
    pack: ChunkPacker,
    *,
    keep_bad: bool,
    num_workers: int,
    progress: Callable[[str], None],
) -> list[ChunkReport]:
    """Pack the chunks and return all reports, in order. Finished ones are kept; those with bad pairs, if `keep_bad`."""
    with in_processes(pack.finished, num_workers) as map_:
        making = pack.output / MAKING_FOLDER
        found = (chunk for chunk in enumerate(chunks) if (making / f"{chunk[0]:06d}.json").exists())
        whole = [report for report in map_(found) if report]
    # The user, who did not accept the bad pairs, may have mended them.
    reports = {report.number: report for report in whole if keep_bad or not report.problems}
    if reports:
        progress(f"{len(reports)} of {len(chunks)} shards are kept")
    speed = Progress(sum(len(chunk) for number, chunk in enumerate(chunks) if number not in reports))
    with in_processes(pack, num_workers) as map_:
        for report in map_((number, chunk) for number, chunk in enumerate(chunks) if number not in reports):
            reports[report.number] = report
            rate, bad = speed.advance(report.num_pairs), sum(len(each.problems) for each in reports.values())
            name = f"shard-{report.number:06d}{'-*' if pack.packing.max_bytes else ''}.tar"
            progress(f"{name}: {len(reports)} of {len(chunks)}, {rate}, {bad} bad pairs")
    return [reports[number] for number in range(len(chunks))]


def check_tar_writer() -> None:
    """Raise ModuleNotFoundError if what writes tars is not installed, before there is any work to lose."""
    if find_spec("webdataset") is None:
        raise ModuleNotFoundError("tars are written by webdataset", name="webdataset")


class ChunkWriter:
    """Writes samples into a chunk's tars; each tar appears whole or not at all."""

    def __init__(self, output: Path, number: int, max_bytes: int = 0) -> None:
        self.records: list[tuple[Any, ...]] = []
        self.tars: list[FileState] = []
        self._output, self._number, self._max_bytes = output, number, max_bytes
        self._temporary = output / MAKING_FOLDER / f"{number:06d}.{os.getpid()}.tmp"
        self._writer: Any = None

    def add(self, key: str, packed: PackedPair) -> None:
        """Add a sample to the open tar, or to the next one if it would grow beyond the limit."""
        members = {packed.extension: packed.image, LABEL_EXTENSION: packed.label}
        grown = sum(_size_of_member(f"{key}.{extension}", len(data)) for extension, data in members.items() if data)
        if self._writer and self._max_bytes and _size_of_tar(self._writer.tarstream.offset + grown) > self._max_bytes:
            self.close()
        if self._writer is None:
            from webdataset.writer import TarWriter  # imports torch, for which `--help` should not wait

            self._file = create(self._temporary)
            self._writer = TarWriter(self._file, encoder=False, mtime=0, format="PAX_FORMAT")
        image = self._append(key, packed.extension, packed.image)
        label = self._append(key, LABEL_EXTENSION, packed.label) if packed.label else Place(0, 0)
        data = packed.image, packed.label
        self.records.append(make_record(key, (image, label), data, packed.facts, len(self.tars)))

    def _append(self, key: str, extension: str, data: bytes) -> Place:
        self._writer.write({"__key__": key, extension: data})
        tar = self._writer.tarstream
        tar.members.clear()  # tarfile's list would grow with every member
        return Place(tar.offset - _rounded_up(len(data), tarfile.BLOCKSIZE), len(data))

    def close(self) -> None:
        """Finish the open tar, if there is one."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self._file.close()
        sync(self._temporary)
        suffix = f"-{len(self.tars):03d}" if self._max_bytes else ""
        path = self._output / f"shard-{self._number:06d}{suffix}.tar"
        self._temporary.rename(path)
        self.tars.append(FileState.of(path))

    def discard(self) -> None:
        """Remove the tar that is not finished."""
        if self._writer is not None:
            for stream in (self._writer.tarstream.fileobj, self._file):
                with contextlib.suppress(OSError):  # the error that tells of a full disk is already on its way
                    stream.close()
        self._temporary.unlink(missing_ok=True)


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _size_of_member(name: str, size: int) -> int:
    """Return the bytes that a member takes in a tar, with its headers: a long name has one of its own."""
    return len(tarfile.TarInfo(name).tobuf(tarfile.PAX_FORMAT)) + _rounded_up(size, tarfile.BLOCKSIZE)


def _size_of_tar(end: int) -> int:
    """Return the bytes of a tar whose members end at `end`: two empty blocks follow, and records are whole."""
    return _rounded_up(end + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)
