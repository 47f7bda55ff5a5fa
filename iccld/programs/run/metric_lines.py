"""Reads the lines of a run's `metrics.jsonl`, which may be torn, or of an earlier version."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iccld.reading import MIB, read_limited

MAX_METRICS = 1024 * MIB


def read_entries(run_dir: Path) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl, without what a crash has torn."""
    path = run_dir / "metrics.jsonl"
    lines = read_limited(path, MAX_METRICS).decode(errors="replace").splitlines() if path.is_file() else []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and {"stage", "step"} <= entry.keys()]


def steps_done(entry: Mapping[str, Any]) -> int | None:
    """The number of steps done when a line was written, at least 1; None if it does not say."""
    step = entry["step"]  # of the last step done, counted from 0
    return step + 1 if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 53 else None


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def curve(entries: list[Mapping[str, Any]], name: str, *, stage: str) -> list[tuple[int, float]]:
    """The steps done and the finite values of one metric of a stage, in ascending order of steps."""
    found: dict[int, float] = {}
    for entry in entries:
        step, value = steps_done(entry), number(entry.get(name))
        if entry["stage"] == stage and step is not None and value is not None:
            found[step] = value
    return sorted(found.items())


def names_of(entries: list[Mapping[str, Any]], *, stage: str) -> list[str]:
    """The names of a stage's metrics, sorted."""
    names = {name for entry in entries if entry["stage"] == stage for name in entry}
    return sorted(names - {"stage", "step"})
