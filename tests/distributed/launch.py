"""Starts real ranks on this machine, as the project's launcher does."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_jobs(jobs: list[dict[str, Any]], *, num_processes: int, timeout_s: int = 300) -> None:
    """Train `jobs` (see worker.py) one after another on `num_processes` ranks of one launch."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(jobs))
        file.flush()
        run_module("tests.distributed.worker", file.name, num_processes=num_processes, timeout_s=timeout_s)


def run_module(module: str, *arguments: str, num_processes: int, timeout_s: int = 300) -> None:
    """Run a module on every rank; fails with the end of its output."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / ("ddp.yaml" if num_processes > 1 else "cpu.yaml"))]
    launch += ["--num_processes", str(num_processes), "--main_process_port", "0", "--module", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        launch, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
