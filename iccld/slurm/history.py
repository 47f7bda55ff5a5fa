"""Records of a run directory's earlier jobs, for the next job: nodes that failed, and how long a save takes."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path

from iccld.reading import MIB, read_limited

FAILURES = 2  # after so many failures of a node, the run's jobs avoid it
UNKNOWN_LEAD_S = 300
LONGEST_S = 86400.0  # a longer save or step is not believed
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")


def failing_nodes(run_dir: Path) -> list[str]:
    """Return nodes on which attempts of this run (or of runs below it) failed twice; `failed_nodes` says why."""
    attempts: dict[str, set[str]] = defaultdict(set)
    for path in (run_dir / "slurm" / "failed_nodes", *run_dir.glob("*/slurm/failed_nodes")):
        for line in _lines(path):
            parts = line.split("\t")
            if len(parts) >= 3 and _NODE.fullmatch(parts[0]):  # else torn, or left by an editor
                attempts[parts[0]].add(parts[2])
    return sorted(node for node, failed in attempts.items() if len(failed) >= FAILURES)


def lead_time_s(run_dir: Path) -> int:
    """Return the seconds before the limit at which to ask for a save.

    They are a minute, three times the longest known save, and two steps. The minute covers SLURM, which looks at its
    limits every 30 s. Without a checkpoint yet, 5 minutes.
    """
    saves = [_save_s(path) for path in run_dir.glob("**/checkpoints/step_*[0-9]/manifest.json")]
    if not saves:
        return UNKNOWN_LEAD_S
    return round(60 + 3 * max(saves) + 2 * _step_s(run_dir))


def _save_s(manifest: Path) -> float:
    return _seconds("\n".join(_lines(manifest)), "save_s")


def _step_s(run_dir: Path) -> float:
    """Return the seconds of the longest of the last logged steps."""
    steps = [0.0]
    for path in run_dir.glob("**/metrics.jsonl"):
        steps += [_seconds(line, "step_s") for line in _lines(path)[-20:]]
    return max(steps)


def _lines(path: Path) -> list[str]:
    """Return the lines of a file that may be gone, or torn by a crash."""
    try:
        return read_limited(path, 256 * MIB).decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return []


def _seconds(text: str, name: str) -> float:
    """Return a number of an object in JSON; 0 if it is torn, or no number of seconds."""
    try:
        found = json.loads(text)
        seconds = float(found.get(name, 0.0)) if isinstance(found, dict) else 0.0
    except (ValueError, TypeError, OverflowError, RecursionError):
        return 0.0
    return seconds if math.isfinite(seconds) and 0 <= seconds < LONGEST_S else 0.0
