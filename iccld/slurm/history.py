"""What earlier jobs of a run directory left for the next one: nodes that failed, and how long a save takes."""

import json
from collections import defaultdict
from pathlib import Path

FAILURES = 2  # of a node, after which no further job of the run is started on it
UNKNOWN_LEAD_S = 300


def failing_nodes(run_dir: Path) -> list[str]:
    """Nodes on which attempts of this run (or of an array's runs below it) failed twice; `failed_nodes` says why."""
    attempts: dict[str, set[str]] = defaultdict(set)
    for path in (run_dir / "slurm" / "failed_nodes", *run_dir.glob("*/slurm/failed_nodes")):
        for line in path.read_text().splitlines() if path.is_file() else []:
            parts = line.split("\t")
            if len(parts) >= 3:  # else torn, or left by an editor
                attempts[parts[0]].add(parts[2])
    return sorted(node for node, failed in attempts.items() if len(failed) >= FAILURES)


def lead_time_s(run_dir: Path) -> int:
    """How long before the limit to ask for a save: a minute, three times the longest save that is known, and two steps.

    The minute covers SLURM, which looks at its limits every 30 s. Without a checkpoint yet, 5 minutes.
    """
    saves = [_save_s(path) for path in run_dir.glob("**/stage*/checkpoints/step_*[0-9]/manifest.json")]
    if not saves:
        return UNKNOWN_LEAD_S
    return round(60 + 3 * max(saves) + 2 * _step_s(run_dir))


def _save_s(manifest: Path) -> float:
    try:
        return float(json.loads(manifest.read_text()).get("save_s", 0.0))
    except (OSError, ValueError):
        return 0.0


def _step_s(run_dir: Path) -> float:
    """The longest step among the last that were logged."""
    steps = [0.0]
    for path in run_dir.glob("**/metrics.jsonl"):
        for line in path.read_text().splitlines()[-20:]:
            try:
                steps.append(float(json.loads(line).get("step_s", 0.0)))
            except ValueError:  # torn by a crash
                continue
    return max(steps)
