"""The benchmarks of checkpoints and engines run as scripts, at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(tmp_path: Path, script: str, *arguments: str) -> tuple[str, dict]:
    command = [sys.executable, str(ROOT / "tools" / "benchmarks" / script), *arguments, "--json", "figures.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert not done.returncode, done.stderr
    return done.stdout, json.loads((tmp_path / "figures.json").read_text())


def test_ours_is_compared_with_save_state(tmp_path: Path) -> None:
    table, figures = bench(tmp_path, "bench_checkpoint.py", "--params", "0.1,1", "--saves", "2", "--rounds", "1")
    assert figures["stall_over_save_state"] > 0 and figures["total_over_save_state"] > 0
    small, large = figures["runs"]
    assert small["num_params"] < large["num_params"] and "synchronous" in table
    for mode in ("asynchronous", "synchronous", "save_state"):
        own = large[mode]
        assert own["bytes"] > 12 * large["num_params"]  # weights and two moments, fp32
        assert 0 < own["stall_s"] <= own["total_s"] <= own["durable_s"] and own["restore_s"] > 0


@pytest.mark.distributed
def test_engines_are_compared_at_one_global_batch(tmp_path: Path) -> None:
    size = ("--params", "0.2", "--size", "32", "--steps", "2", "--engines", "ddp", "fsdp2")
    table, figures = bench(tmp_path, "bench_engines.py", *size)
    assert "global batch 4" in table
    assert figures["engines"].keys() == {"ddp", "fsdp2"}
    for own in figures["engines"].values():
        assert own["num_params"] > 2e5 and own["peak_bytes"] > 0 and own["step_s"] > 0
        assert own["sent_bytes"] >= 4 * own["num_params"]  # an average of fp32 gradients over two ranks, at the least
        assert 0 < own["ema_over_step"] < 1
