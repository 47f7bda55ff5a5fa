"""Checkpoints that appear whole or not at all.

    stage1/checkpoints/step_00012000/  manifest.json  module.safetensors  optimizer.pt  stage.safetensors
    stage1/checkpoints/latest          the name of the newest whole one

Every rank writes its parts into `step_N.tmp`; when all have, rank 0 writes the manifest (sizes, checksums), the folder
is renamed, `latest` replaced, and only then are older ones removed. Nothing is unpickled without `weights_only`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class Ranks(Protocol):
    """What a checkpoint needs of the engine."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather_objects(self, value: Any) -> list[Any]: ...


@dataclass
class CheckpointConfig:
    """How often to save, and how many whole checkpoints stay."""

    save_every: int = 1000
    keep: int = 2

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

    def load(self, part: str) -> dict[str, Any]:
        path = self.folder / self.manifest["parts"][part]
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


class CheckpointStore:
    """The checkpoints of one stage of one run."""

    def __init__(self, folder: Path, config: CheckpointConfig, ranks: Ranks, report: Callable[[str], None]) -> None:
        self.folder, self.config, self.ranks, self.report = folder, config, ranks, report

    def save(self, step: int, parts: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> Path:
        """Write `parts` (replicated states by name) and `about` (JSON) as the checkpoint of `step`.

        Call on every rank.
        """
        final = self.folder / f"step_{step:08d}"
        scratch = final.with_suffix(".tmp")
        failure = (
            f"checkpoint {final} was not written; the one before it is whole. Make room, and the same command goes on"
        )
        self._together(lambda: self._clear(scratch) if self.ranks.rank == 0 else None, failure)
        names = {part: _file_name(part, state) for part, state in parts.items()}
        mine = [part for i, part in enumerate(sorted(parts)) if i % self.ranks.world_size == self.ranks.rank]
        write = partial(_write_parts, scratch, {names[part]: parts[part] for part in mine})
        files = {name: facts for of_rank in self._together(write, failure) for name, facts in of_rank.items()}
        manifest = {"format": FORMAT_VERSION, "step": step, "parts": names, "files": files, **about}
        self._together(lambda: self._commit(scratch, final, manifest) if self.ranks.rank == 0 else None, failure)
        return final

    def _together(self, work: Callable[[], Any], failure: str) -> list[Any]:
        """Do the work on every rank and wait for all; if one rank fails, all raise, and none is left waiting."""
        try:
            outcome = (work(), "")
        except Exception as error:  # disk full comes as OSError, RuntimeError or SafetensorError
            outcome = (None, f"rank {self.ranks.rank}: {error}")
        outcomes = self.ranks.gather_objects(outcome)
        failures = [message for _, message in outcomes if message]
        if failures:
            raise CheckpointError(f"{failure} ({'; '.join(failures)}).")
        return [value for value, _ in outcomes]

    def _clear(self, scratch: Path) -> None:
        for torn in self.folder.glob("step_*.tmp"):
            shutil.rmtree(torn)
        scratch.mkdir(parents=True)

    def _commit(self, scratch: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        write_text_durably(scratch / MANIFEST, json.dumps(manifest, indent=1))
        _fsync(scratch)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be in the way
        scratch.rename(final)
        _fsync(self.folder)
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
        return self._together(lambda: self._find_newest() if self.ranks.rank == 0 else None, failure)[0]

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


def verify(folder: Path) -> Checkpoint:
    """Read the manifest and check every file's size and checksum. Raises CheckpointError naming the file."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, parts = manifest["format"], set(manifest["parts"].values())
        files = {name: (facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()}
        whole = parts == files.keys() and folder.name == f"step_{manifest['step']:08d}"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error}).") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"checkpoint {folder} has format {version}, not {FORMAT_VERSION}.")
    if not whole:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} does not fit the folder.")
    for name, (size, checksum) in files.items():
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


def write_text_durably(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old one or the new one."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    _fsync(scratch)
    scratch.replace(path)
    _fsync(path.parent)


def _file_name(part: str, state: Mapping[str, Any]) -> str:
    only_tensors = all(isinstance(value, torch.Tensor) for value in state.values())
    return f"{part}.safetensors" if only_tensors else f"{part}.pt"


def _write_parts(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: _write(folder / name, state) for name, state in files.items()}


def _write(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(dict(state), path)
    _fsync(path)
    return {"size": path.stat().st_size, "sha256": file_checksum(path)}


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
