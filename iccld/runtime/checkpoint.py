"""Checkpoints that appear whole or not at all.

    stage1/checkpoints/step_00012000/  manifest.json  rank_00000.safetensors  rank_00001.safetensors ...
    stage1/checkpoints/latest          the name of the newest whole one

Every rank writes its file into `step_N.tmp`; when all have, rank 0 writes the manifest (sizes, checksums, where each
tensor lies), the folder is renamed, `latest` replaced, and only then are older ones removed. The step path pays the
copy to host memory; a thread on each rank does the rest. Nothing is ever unpickled.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from iccld.runtime.durable import file_checksum, sync, write_text_durably
from iccld.runtime.pieces import Run, TensorReader, join_tables, write_runs

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


class Ranks(Protocol):
    """What a checkpoint needs of the engine."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather_objects(self, value: Any) -> list[Any]: ...

    def gather_saved(self, value: Any) -> list[Any]: ...


@dataclass
class CheckpointConfig:
    """How often to save, how many whole checkpoints stay, and whether training goes on while files are written."""

    save_every: int = 1000
    keep: int = 2
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise ValueError(f"trainer.checkpoint.save_every={self.save_every} must be at least 1 step.")
        if self.keep < 2:
            raise ValueError(f"trainer.checkpoint.keep={self.keep} must be at least 2, so that one may be damaged.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @cached_property
    def reader(self) -> TensorReader:
        return TensorReader(self.folder, self.manifest["tensors"])


class CheckpointStore:
    """The checkpoints of one stage of one run. `announce` is called on every rank when a step is durable."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        *,
        report: Callable[[str], None] = print,
        announce: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.folder, self.config, self.ranks = folder, config, ranks
        self.report, self.announce = report, announce
        self._newest_saved: int | None = None
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def save(self, step: int, runs: Mapping[str, Run], about: Mapping[str, Any]) -> None:
        """Write what this rank holds (`runs`) and `about` (JSON, the same on all ranks) as the checkpoint of `step`.

        Call on every rank. Returns when the runs are in host memory, or, not asynchronous, when the checkpoint is
        durable; at once for the step that was saved last. Raises CheckpointError for the save before, if that failed.
        """
        self.wait()
        if step == self._newest_saved:
            return
        held = self._to_host(runs)
        self._saving = self._thread.submit(self._write, step, held, dict(about))
        if not self.config.asynchronous:
            self.wait()

    @property
    def has_failed(self) -> bool:
        """Whether the last save has failed, as `wait` would say."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Until the last save is durable. Raises CheckpointError on all ranks if it failed on one."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _to_host(self, runs: Mapping[str, Run]) -> dict[str, Run]:
        """A copy in buffers that are kept: touching fresh memory costs more than the copy."""
        held = {}
        for name, run in runs.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != run.data.shape or buffer.dtype != run.data.dtype:
                buffer = torch.empty(run.data.shape, dtype=run.data.dtype, pin_memory=run.data.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(run.data, non_blocking=True)
            held[name] = Run(run.shape, run.start, buffer)
        if any(run.data.is_cuda for run in runs.values()):
            torch.cuda.current_stream().synchronize()
        return held

    def _write(self, step: int, runs: Mapping[str, Run], about: Mapping[str, Any]) -> None:
        """In the background thread of every rank."""
        begin = time.monotonic()
        final = self.folder / f"step_{step:08d}"
        scratch = final.with_suffix(".tmp")
        failure = (
            f"checkpoint {final} was not written; the one before it is whole. Make room, and run the command again"
        )
        gather, is_main = self.ranks.gather_saved, self.ranks.rank == 0
        file = f"rank_{self.ranks.rank:05d}.safetensors"
        _together(gather, lambda: self._clear(scratch) if is_main else None, failure)
        written = _together(gather, lambda: {file: write_runs(scratch / file, runs)}, failure)
        files = {name: facts for of_rank in written for name, facts in of_rank.items()}
        manifest = {"format": FORMAT_VERSION, "step": step, "save_s": round(time.monotonic() - begin, 3), **about}
        _together(gather, lambda: self._commit(scratch, final, manifest, files) if is_main else None, failure)
        self._newest_saved = step
        self.announce(step)

    def _clear(self, scratch: Path) -> None:
        for torn in self.folder.glob("step_*.tmp"):
            shutil.rmtree(torn)
        scratch.mkdir(parents=True)

    def _commit(self, scratch: Path, final: Path, manifest: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        tensors = join_tables([facts["tensors"] for facts in files.values()])
        sizes = {name: {"size": facts["size"], "sha256": facts["sha256"]} for name, facts in files.items()}
        manifest = {**manifest, "files": sizes, "tensors": tensors}
        write_text_durably(scratch / MANIFEST, json.dumps(manifest))
        sync(scratch)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be in the way
        scratch.rename(final)
        sync(self.folder)
        write_text_durably(self.folder / "latest", final.name)
        # What has a higher number than the one just written was passed over as damaged when the run went on.
        kept = [folder for folder in self.folders() if folder.name <= final.name][-self.config.keep :]
        for old in set(self.folders()) - set(kept):
            shutil.rmtree(old)

    def folders(self) -> list[Path]:
        """The committed checkpoints' folders, oldest first."""
        return sorted(p for p in self.folder.glob("step_*") if p.is_dir() and p.suffix != ".tmp")

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; rank 0 looks for it, so that all ranks go on from the same one.

        Broken ones are reported by name and passed over; all broken is an error.
        """
        failure = f"no checkpoint in {self.folder} can be used"
        find = self._find_newest if self.ranks.rank == 0 else lambda: None
        return _together(self.ranks.gather_objects, find, failure)[0]

    def _find_newest(self) -> Checkpoint | None:
        folders = self.folders()
        for folder in reversed(folders):
            try:
                return verify(folder)
            except CheckpointError as error:
                self.report(str(error))
        if folders:
            raise CheckpointError(
                f"all {len(folders)} are damaged; remove the folder to start anew, or restore one from a copy"
            )
        return None


def _together(gather: Callable[[Any], list[Any]], work: Callable[[], Any], failure: str) -> list[Any]:
    """Do the work on every rank and wait for all; if one rank fails, all raise, and none is left waiting."""
    try:
        outcome = (work(), "")
    except Exception as error:  # a full disk comes as OSError or RuntimeError
        outcome = (None, f"{type(error).__name__}: {error}")
    outcomes = gather(outcome)
    failures = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(outcomes) if message]
    if failures:
        raise CheckpointError(f"{failure} ({'; '.join(failures)}).")
    return [value for value, _ in outcomes]


def verify(folder: Path) -> Checkpoint:
    """Read the manifest and check every file's size and checksum. Raises CheckpointError naming the file."""
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        size, checksum = facts["size"], facts["sha256"]
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing.")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes, not {size}."
            )
        if file_checksum(path) != checksum:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} does not match its checksum.")
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whole in itself. Raises CheckpointError where it is damaged or of another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error}).") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {folder} has format {version}; this version of iccld reads {FORMAT_VERSION}."
        )
    try:
        sizes = {name: (facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()}
        named = {file for entry in manifest["tensors"].values() for file, _, _ in entry["pieces"]}
        fits = named <= sizes.keys() and folder.name == f"step_{manifest['step']:08d}"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error}).") from error
    if not fits:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} does not fit the folder.")
    return manifest
