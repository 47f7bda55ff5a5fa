"""Starts real ranks on this machine."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iccld.slurm.engine_file import engine_path, engine_variables
from tests.forked import Forked
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "ACCELERATE_USE_CPU": "true",
    "PYTHONFAULTHANDLER": "1",  # a rank that crashes leaves its stacks
}
MIN_NUM_PARAMS = "1000"  # so that FSDP shards the tiny model's layers on their own


def run_jobs(jobs: list[dict[str, Any]], *, num_processes: int, engine: str = "ddp", timeout_s: int = 300) -> None:
    """Train `jobs` (see worker.py) one after another on `num_processes` forked ranks (tests/forked.py).

    Their environment is the one that `iccld submit` gives to ranks, which tests/slurm/test_ranks.py compares with that
    of accelerate's launcher.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "jobs.json")
        file.write_text(json.dumps(jobs))
        logs = [Path(folder, f"log_{rank}") for rank in range(num_processes)]
        ranks = [
            Forked("tests.distributed.worker", [str(file)], environment=environment, log=log)
            for environment, log in zip(rank_environments(num_processes, engine), logs, strict=True)
        ]
        try:
            statuses = _statuses(ranks, timeout_s)
        finally:
            for rank in ranks:
                rank.kill()
        assert statuses == [0] * num_processes, "".join(f"{statuses}\n{log.read_text()[-6000:]}" for log in logs)


def rank_environments(num_processes: int, engine: str) -> Iterator[dict[str, str]]:
    common = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | ENVIRONMENT
    if num_processes > 1:
        common |= engine_variables(engine_path(engine)) | {"FSDP_MIN_NUM_PARAMS": MIN_NUM_PARAMS}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(num_processes):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        yield common | ({name: str(number) for name, number in numbers.items()} if num_processes > 1 else {})


def _statuses(ranks: list[Forked], timeout_s: int) -> list[int | None]:
    """Wait for all ranks, or until one has failed: others may wait for it for ever."""
    limit = time.monotonic() + timeout_s
    statuses: list[int | None] = [None]
    while None in statuses and not any(statuses) and time.monotonic() < limit:
        time.sleep(0.02)
        statuses = [rank.poll() for rank in ranks]
    return statuses


def run_module(module: str, *arguments: str, num_processes: int, engine: str = "ddp", timeout_s: int = 300) -> None:
    """Run a module on every rank; fails with the end of its output."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    file = "cpu.yaml" if engine == "ddp" and num_processes == 1 else f"{engine}.yaml"
    launch += ["--config_file", str(ROOT / "accelerate_configs" / file)]
    if engine == "fsdp2":
        launch += ["--fsdp_min_num_params", MIN_NUM_PARAMS]
    launch += ["--num_processes", str(num_processes), "--main_process_port", "0", "--module", module, *arguments]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(
        launch, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def run_on_two_nodes(module: str, *arguments: str, engine: str, timeout_s: int = 300) -> None:
    """A launcher for each of two nodes, as on a cluster without a scheduler, both on this machine and forked."""
    port, environment = free_port(), os.environ | ENVIRONMENT
    launch = ["--config_file", str(ROOT / "accelerate_configs" / f"{engine}.yaml"), "--num_machines", "2"]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"log_{rank}") for rank in range(2)]
        nodes = [
            Forked(
                "accelerate.commands.launch",
                [*launch, "--machine_rank", str(rank), "--module", module, *arguments],
                environment=environment,
                log=log,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            for node, log in zip(nodes, logs, strict=True):
                assert node.wait(timeout_s) == 0, log.read_text()[-6000:]
        finally:
            for node in nodes:
                node.kill()
