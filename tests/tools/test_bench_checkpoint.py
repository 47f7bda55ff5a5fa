"""The benchmarks of checkpoints and engines at toy size."""

import json
import sys
from pathlib import Path
from typing import Any

import bench_checkpoint
import bench_engines
import pytest


def test_ours_is_compared_with_save_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours are measured in this process; save_state, whose accelerator leaves its state, in its own."""
    apart = bench_checkpoint.in_own_process

    def measured(mode: str, num_params: float, num_saves: int) -> dict[str, Any]:
        is_apart = mode == "save_state"
        return (apart if is_apart else bench_checkpoint.measure)(mode, num_params, num_saves)

    monkeypatch.setattr(bench_checkpoint, "in_own_process", measured)
    command = ["bench_checkpoint", "--params", "0.1,1", "--saves", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "figures.json")])
    bench_checkpoint.main()
    figures, table = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert figures["stall_over_save_state"] > 0 and figures["total_over_save_state"] > 0
    small, large = figures["runs"]
    assert small["num_params"] < large["num_params"] and "synchronous" in table
    for mode in ("asynchronous", "synchronous", "save_state"):
        own = large[mode]
        assert own["bytes"] > 12 * large["num_params"]  # weights and two moments, fp32
        assert 0 < own["stall_s"] <= own["total_s"] <= own["durable_s"] and own["restore_s"] > 0


@pytest.mark.distributed
@pytest.mark.parametrize("engines", [["fsdp2"], pytest.param([*bench_engines.ENGINES], marks=pytest.mark.slow)])
def test_engines_are_compared_at_one_global_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engines: list[str]
) -> None:
    size = ("--params", "0.2", "--size", "32", "--steps", "2", "--engines", *engines)
    monkeypatch.setattr(sys, "argv", ["bench_engines", *size, "--json", str(tmp_path / "figures.json")])
    bench_engines.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "global batch 4" in capsys.readouterr().out
    assert [*figures["engines"]] == engines
    for own in figures["engines"].values():
        assert own["num_params"] > 2e5 and own["peak_bytes"] > 0 and own["step_s"] > 0
        assert own["sent_bytes"] >= 4 * own["num_params"]  # an average of fp32 gradients over two ranks, at the least
        assert 0 < own["ema_over_step"] < 1
