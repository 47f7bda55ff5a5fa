"""Starts real ranks on this machine, as the project's launcher does."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "ACCELERATE_USE_CPU": "true",
    "PYTHONFAULTHANDLER": "1",  # a rank that crashes leaves its stacks
}


def run_jobs(jobs: list[dict[str, Any]], *, num_processes: int, engine: str = "ddp", timeout_s: int = 300) -> None:
    """Train `jobs` (see worker.py) one after another on `num_processes` ranks of one launch."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(jobs))
        file.flush()
        run_module(
            "tests.distributed.worker", file.name, num_processes=num_processes, engine=engine, timeout_s=timeout_s
        )


def run_module(module: str, *arguments: str, num_processes: int, engine: str = "ddp", timeout_s: int = 300) -> None:
    """Run a module on every rank; fails with the end of its output."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    file = "cpu.yaml" if engine == "ddp" and num_processes == 1 else f"{engine}.yaml"
    launch += ["--config_file", str(ROOT / "accelerate_configs" / file)]
    if engine == "fsdp2":
        launch += ["--fsdp_min_num_params", "1000"]  # so that the tiny model's layers are sharded on their own
    launch += ["--num_processes", str(num_processes), "--main_process_port", "0", "--module", module, *arguments]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(
        launch, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def run_on_two_nodes(module: str, *arguments: str, engine: str, timeout_s: int = 300) -> None:
    """A launcher for each of two nodes, as on a cluster without a scheduler, both on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | ENVIRONMENT
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / f"{engine}.yaml"), "--num_machines", "2"]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    nodes = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), "--module", module, *arguments],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for node in nodes:
            output, _ = node.communicate(timeout=timeout_s)
            assert node.returncode == 0, output[-6000:]
    finally:
        for node in nodes:
            node.kill()
