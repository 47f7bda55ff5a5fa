"""Reading of the lines of a run's `metrics.jsonl`, which may be torn, or of an earlier version."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iccld.reading import MIB, read_limited
from iccld.runtime.measure.metric_entries import entries_of

MAX_METRICS = 1024 * MIB


def read_entries(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, of any format, as `entries_of` does; [] if there is no such file."""
    path = run_dir / "metrics.jsonl"
    return entries_of(read_limited(path, MAX_METRICS).decode(errors="replace")) if path.is_file() else []


def last_entries(run_dir: Path) -> list[dict[str, Any]]:
    """Read the last MiB of metrics.jsonl, as `read_entries` reads all of it."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - MIB, 0))
        return entries_of(file.read(MIB).decode(errors="replace"))  # a line that is cut is passed over


def number(value: Any) -> float | None:
    """Return a finite number; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def curve(entries: Sequence[Mapping[str, Any]], name: str, *, stage: str) -> list[tuple[int, float]]:
    """Return the steps done and the finite values of one metric of a stage, in ascending order of steps."""
    found: dict[int, float] = {}
    for entry in entries:
        value = number(entry.get(name))
        if entry["stage"] == stage and value is not None:
            found[entry["step"]] = value
    return sorted(found.items())


def names_of(entries: Sequence[Mapping[str, Any]], *, stage: str) -> list[str]:
    """Return the names of a stage's metrics, sorted."""
    names = {name for entry in entries if entry["stage"] == stage for name in entry}
    return sorted(names - {"stage", "step"})
