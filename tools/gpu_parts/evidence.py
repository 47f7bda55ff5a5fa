"""Part evidence: a grid of runs on a benchmark that is given, by `iccld ablate`, as far as the time goes.

EVIDENCE names a folder with `grid.yaml` and whatever its settings name by paths from that folder (shards, a backbone).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

STOP_S = 60.0  # for the runs to save, and for the report
LEAST_S = 2 * STOP_S  # else no run would come to its first checkpoint
KEPT = ("summary.json", "report.md")


def evidence(folder: Path, *, limit_s: float) -> dict[str, Any]:
    """The means by run name; summary and report go into the folder as `evidence_*`, and its end says what is left."""
    given = os.environ.get("EVIDENCE", "")
    if not given:
        return {"skipped": "EVIDENCE names no folder with a grid.yaml"}
    if limit_s < LEAST_S:
        return {"skipped": f"at least {LEAST_S:g} s are needed, {limit_s:g} s are left"}
    output, at_once = folder / "runs", 4 if torch.cuda.is_available() else 1
    command = [sys.executable, "-m", "iccld", "ablate", "grid.yaml", "--output", str(output), "--no-pictures"]
    log = folder / "evidence.log"
    status = _until(limit_s - 1.5 * STOP_S, [*command, "--processes", str(at_once)], given, log)
    if status:  # else it has reported
        _until(STOP_S, [*command, "--report-only"], given, log)
    for name in KEPT:
        if (output / name).exists():
            shutil.copy(output / name, folder / f"evidence_{name}")
    found = output / "summary.json"
    runs = json.loads(found.read_text()) if found.exists() else {}
    figures = {name: {key: row.get(key) for key in ("miou_mean", "miou_std", "seeds")} for name, row in runs.items()}
    return {"status": status, "runs": figures, **({} if figures else {"failed": log.read_text()[-800:]})}


def _until(limit_s: float, command: list[str], folder: str, log: Path) -> int:
    """The command's status; at the limit it is asked to stop, and saves."""
    with log.open("a") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                return process.wait(STOP_S / 2)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()
