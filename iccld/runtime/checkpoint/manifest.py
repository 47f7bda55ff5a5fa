"""Manifest of a checkpoint, `manifest.json`: its content, each tensor's place, and the checksums of its files."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iccld.durable import NotOursError, file_checksum, is_plain_name, refuse_unless_plain, write_whole
from iccld.reading import is_count, read_json, read_limited
from iccld.runtime.checkpoint.dtypes import SAFETENSORS_CODES
from iccld.runtime.checkpoint.errors import DamagedError, ForeignFormatError

if TYPE_CHECKING:
    from iccld.runtime.checkpoint.pieces import TensorReader

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step_\d{8}")
"""The name of a checkpoint's folder."""
MAX_BYTES = 1 << 28
MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class Checkpoint:
    """Whole, verified checkpoint."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @cached_property
    def reader(self) -> "TensorReader":
        from iccld.runtime.checkpoint.pieces import TensorReader

        return TensorReader(self.folder, self.manifest["tensors"])


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` (JSON, with `files`, `tensors` and `step`), the format, and a checksum of both."""
    facts = json.loads(json.dumps({**facts, "format": FORMAT_VERSION}))  # as it will be read: keys are strings
    write_whole(folder / MANIFEST, json.dumps({**facts, "sha256": _checksum(facts)}))


def _checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> Checkpoint:
    """Check the manifest, and every file's size and checksum; a link in place of a file is damage.

    Raises DamagedError, which names the file, ForeignFormatError, or OSError if a file is there and cannot be read.
    """
    manifest = read_manifest(folder)
    for name, facts in manifest["files"].items():
        path, size = folder / name, facts["size"]
        if path.is_symlink() or not path.is_file():
            what = "a link" if path.is_symlink() else "missing"
            raise DamagedError(f"checkpoint {folder} is damaged: {name} is {what}.")
        if path.stat().st_size != size:
            raise DamagedError(f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes, not {size}.")
        if file_checksum(path) != facts["sha256"]:
            raise DamagedError(f"checkpoint {folder} is damaged: {name} does not match its checksum.")
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and check that it is whole in itself. Raises the errors of `verify`."""
    damaged = f"checkpoint {folder} is damaged: {MANIFEST}"
    try:
        refuse_unless_plain(folder / MANIFEST)
        manifest = read_json(folder / MANIFEST, MAX_BYTES)
        if not isinstance(manifest, dict):
            raise DamagedError(f"{damaged} is not one JSON object.")
        checksum, version = manifest.pop("sha256", None), manifest.get("format")
        found = _checksum(manifest)
    except FileNotFoundError:
        raise DamagedError(f"{damaged} is missing.") from None
    except RecursionError as error:
        raise DamagedError(f"{damaged} is nested too deeply.") from error
    except NotOursError as error:
        raise DamagedError(f"checkpoint {folder} is damaged: {error}") from error
    except DamagedError:
        raise
    except ValueError as error:
        raise DamagedError(f"{damaged} cannot be used: {error}") from error
    if checksum is None and isinstance(version, int) and version != FORMAT_VERSION:
        raise ForeignFormatError(
            f"checkpoint {folder} has format {version}, and this version of iccld reads {FORMAT_VERSION}; "
            f"use the version that wrote it, or another run_dir."
        )
    if checksum != found:
        raise DamagedError(f"{damaged} does not match its checksum.")
    if wrong := _fault(manifest):
        raise DamagedError(f"{damaged} has {wrong}.")
    if folder.name != f"step_{manifest['step']:08d}":
        raise DamagedError(f"{damaged} is of step {manifest['step']}.")
    return manifest


def _fault(manifest: Mapping[str, Any]) -> str:
    """Say what is wrong with the step, the files and the tensors of a manifest, which may be a stranger's; else ""."""
    step, files, tensors = (manifest.get(name) for name in ("step", "files", "tensors"))
    if not is_count(step) or not isinstance(files, dict) or not isinstance(tensors, dict):
        return "no step, files and tensors"
    for name, facts in files.items():
        if not is_plain_name(name):
            return f"{name!r} for a file's name, which would lie elsewhere"
        if not isinstance(facts, dict) or not is_count(facts.get("size")) or not isinstance(facts.get("sha256"), str):
            return f"no size and checksum of {name}"
    match manifest:
        case {"stage": str(), "layout": {"engine": str(), "world_size": int()}}:
            pass
        case _:
            return "no stage and layout"
    broken = [name for name, entry in tensors.items() if not _is_entry(entry, files)]
    return f"no place in its files for {broken[0]}" if broken else ""


def _is_entry(entry: Any, files: Mapping[str, Any]) -> bool:
    """Tell whether it says where all of a tensor lies, in files that are large enough: see `pieces`."""
    match entry:
        case {"shape": list(shape), "dtype": str(dtype), "pieces": list(pieces)}:
            rows = [piece for piece in pieces if isinstance(piece, list) and len(piece) == 3]
            is_whole = len(rows) == len(pieces) and all(isinstance(row[0], str) and row[0] in files for row in rows)
            counts = [*shape, *(number for row in rows for number in row[1:])]
            is_plain = is_whole and dtype in SAFETENSORS_CODES and all(map(is_count, counts))
            return is_plain and len(shape) <= MAX_DIMENSIONS and _covers(rows, math.prod(shape), files, dtype)
    return False


def _covers(rows: list[Any], size: int, files: Mapping[str, Any], dtype: str) -> bool:
    """Tell whether the pieces of a tensor of `size` elements leave no gap, and each fits its file."""
    bits, end = int(re.sub(r"\D", "", SAFETENSORS_CODES[dtype]) or 8), 0
    for file, start, stop in sorted(rows, key=lambda row: row[1:]):
        if start != end or stop < start or (stop - start) * bits // 8 > files[file]["size"]:
            return False
        end = stop
    return is_count(size) and end == size


def pointed_at(checkpoints: Path) -> str:
    """Return the name in `latest`; "" if there is none that can be read."""
    try:
        return read_limited(checkpoints / "latest").decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""
