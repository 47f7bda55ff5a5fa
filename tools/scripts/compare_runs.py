"""Compare two finished runs to the bit: models, last checkpoints, and the losses of every step.

python tools/scripts/compare_runs.py runs/old runs/new --num-steps 20
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from iccld.runtime.measure.metric_entries import entries_of

STAGES = ("stage1", "stage2")
FILES = (*(f"{stage}/checkpoints/latest" for stage in STAGES), "metrics.jsonl")
"""Files that each finished run has; another one that is missing is a difference."""


def differences(expected: Path, run_dir: Path, *, num_steps: int) -> Iterator[str]:
    """Return what of a finished run is not, to the bit, as in the expected one."""
    runs = (expected, run_dir)
    for stage in STAGES:
        last = f"{stage}/checkpoints/step_{num_steps:08d}"
        for folder in (last, f"{stage}/final"):
            names, others = (sorted(p.relative_to(run) for p in (run / folder).rglob("*.safetensors")) for run in runs)
            if names != others or not names:
                yield f"other files in {folder}"
                continue
            for name in names:
                one, other = load_file(expected / name), load_file(run_dir / name)
                if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
                    yield f"other tensors in {name}"
        newest = (run_dir / stage / "checkpoints" / "latest").read_text().strip()
        if newest != Path(last).name:
            yield f"{stage}: latest is {newest}"
    one, other = _losses(expected), _losses(run_dir)
    yield from (f"other losses in {place}" for place in {**one, **other} if one.get(place) != other.get(place))


def _losses(run_dir: Path) -> dict[str, dict[str, float]]:
    return {
        f"{line['stage']}, step {line['step']}": {
            name: value for name, value in line.items() if name.startswith("loss")
        }
        for line in entries_of((run_dir / "metrics.jsonl").read_text())
    }


def lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Print in what two finished runs of both stages differ.")
    parser.add_argument("expected", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--num-steps", type=int, required=True, help="optimiser steps of each stage")
    arguments = parser.parse_args()
    for folder in (arguments.expected, arguments.run_dir):
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            parser.error(f"{folder} holds no finished run of both stages ({missing[0]} is missing); give one.")
    found = list(differences(arguments.expected, arguments.run_dir, num_steps=arguments.num_steps))
    for what in found:
        print(what)
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
