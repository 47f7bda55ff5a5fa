"""A checkpoint's manifest, `manifest.json`: what it holds, where each tensor lies, and how to know that it is whole."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from iccld.reading import read_json
from iccld.runtime.durable import file_checksum, write_text_durably
from iccld.runtime.pieces import TensorReader

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MAX_BYTES = 1 << 28


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


class DamagedError(CheckpointError):
    """Something is missing, cut or changed."""


class ForeignFormatError(CheckpointError):
    """Written by another version: good, but not for this one."""


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


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` (JSON, with `files`, `tensors` and `step`), the format, and a checksum of both."""
    facts = json.loads(json.dumps({**facts, "format": FORMAT_VERSION}))  # as it will be read: keys are strings
    write_text_durably(folder / MANIFEST, json.dumps({**facts, "sha256": _checksum(facts)}))


def _checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> Checkpoint:
    """Check the manifest, and every file's size and checksum.

    Raises DamagedError naming the file, ForeignFormatError, or OSError where a file is there and cannot be read.
    """
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        path, size = folder / name, facts["size"]
        if not path.is_file():
            raise DamagedError(f"checkpoint {folder} is damaged: {name} is missing.")
        if path.stat().st_size != size:
            raise DamagedError(f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes, not {size}.")
        if file_checksum(path) != facts["sha256"]:
            raise DamagedError(f"checkpoint {folder} is damaged: {name} does not match its checksum.")
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whole in itself. Raises as `verify` does."""
    damaged = f"checkpoint {folder} is damaged: {MANIFEST}"
    try:
        manifest = read_json(folder / MANIFEST, MAX_BYTES)
    except FileNotFoundError:
        raise DamagedError(f"{damaged} is missing.") from None
    except ValueError as error:
        raise DamagedError(f"{damaged} cannot be used: {error}") from error
    if not isinstance(manifest, dict):
        raise DamagedError(f"{damaged} is not one JSON object.")
    checksum, version = manifest.pop("sha256", None), manifest.get("format")
    if checksum is None and isinstance(version, int) and version != FORMAT_VERSION:
        raise ForeignFormatError(
            f"checkpoint {folder} has format {version}, and this version of iccld reads {FORMAT_VERSION}; "
            f"use the version that wrote it, or another run_dir."
        )
    if checksum != _checksum(manifest):
        raise DamagedError(f"{damaged} does not match its checksum.")
    if folder.name != f"step_{manifest['step']:08d}":
        raise DamagedError(f"{damaged} is of step {manifest['step']}.")
    return manifest
