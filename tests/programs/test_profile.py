"""`iccld profile`: what the report holds, under two ranks, one of them slow, and from batches without data."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from iccld.batch_layout import BatchLayout
from iccld.cli import main
from iccld.config import load_config
from iccld.programs.run.building import build_stage, build_stream
from iccld.programs.run.synthetic import flops_per_sample, synthetic_batch, synthetic_batches
from iccld.runtime.measure import flops as flops_module
from iccld.runtime.measure.profiling import BETWEEN_STEPS, PHASES
from tests.factory import scene_overrides
from tests.faults.ranks import Ranks

SHORT = ("--num-steps", "4", "--num-warmup", "1", "--num-traced", "1")


def report(run_dir: Path, stage: str) -> dict[str, Any]:
    return json.loads((run_dir / f"profile/{stage}/profile.json").read_text())


def check(figures: dict[str, Any], world_size: int) -> None:
    """Check what holds of every report."""
    assert figures["world_size"] == len(figures["ranks"]) == world_size
    for rank in figures["ranks"]:
        assert len(rank["step_s"]) == 4 and rank["peak_bytes"] > 1e6
        assert set(rank["phases"]) == {*PHASES, "copy"} - set(BETWEEN_STEPS)
        assert 0 < sum(rank["phases"].values()) < 1.5 * max(rank["step_s"])
    flops = figures["flops_per_sample"]
    by_part = figures["flops_by_part"].values()
    assert flops["prepare"] == sum(part["prepare"] for part in by_part)
    assert flops["train"] == sum(part["forward"] + part["backward"] for part in by_part)
    achieved = sum(flops.values()) * figures["samples_per_s"] / world_size
    assert figures["achieved_flops_per_rank"] == pytest.approx(achieved)
    assert figures["mfu"] == pytest.approx(achieved / figures["peak_flops"])
    assert figures["gradient_bytes"] == 4 * figures["num_parameters"] > 0
    stored = 3 * figures["gradient_bytes"] + figures["teacher_bytes"]  # weights and two moments of what trains
    assert figures["checkpoint_bytes"] == pytest.approx(stored, rel=0.02)


def test_both_stages_on_two_ranks_one_of_them_slow(scene_shards: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    words = [*SHORT, *scene_overrides(scene_shards, run_dir), "data.validation.shards=", "stage2=paper"]  # quick views
    fault = {"at": "prepare", "rank": 1, "do": "slow", "seconds": 0.3}
    with Ranks(words, tmp_path / "logs", verb="profile", fault=fault) as ranks:
        assert ranks.wait() == [0, 0], ranks.log()[-3000:]
        assert "rank 1" in ranks.log() and "slowest" in ranks.log()
    for stage in ("stage1", "stage2"):
        figures, folder = report(run_dir, stage), run_dir / "profile" / stage
        check(figures, 2)
        fast, slow = figures["ranks"]
        assert slow["phases"]["prepare"] > fast["phases"]["prepare"] + 0.2
        assert fast["phases"]["agree"] > slow["phases"]["agree"] + 0.2, "the others wait for it"
        assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
        for rank in (fast, slow):
            trace = json.loads(gzip.decompress((folder / rank["trace"]).read_bytes()))
            names = {event.get("name") for event in trace["traceEvents"]}
            assert {"phase: prepare", "phase: forward", "phase: backward", "phase: optimizer"} <= names
    assert not list(run_dir.glob("stage*")) and not (run_dir / "config.yaml").exists(), "nothing is kept but the report"


def test_batches_without_data(tmp_path: Path):
    settings = ["model=tiny", "stage=adversarial", f"run_dir={tmp_path}", "data.crop_size=[48,64]"]
    settings += ["model.latent_channels=4", "model.denoiser.width=16", "metrics.peak_tflops=0.01"]
    assert (
        main(["profile", "--synthetic", *SHORT, *settings, "data.source.shards=none", "data.target.shards=none"]) == 0
    )
    figures = report(tmp_path, "stage2")
    check(figures, 1)
    assert figures["synthetic"] and figures["peak_flops"] == 1e10
    assert figures["roofline"]["parts"].keys() >= {"encoder", "denoiser", "discriminator"}
    assert all(part["bytes"] > 0 for part in figures["roofline"]["parts"].values())


def test_batches_without_data_are_shaped_as_the_stream_s(scene_shards: Path, tmp_path: Path):
    config = load_config(scene_overrides(scene_shards, tmp_path))
    layout = BatchLayout(global_batch_size=8, micro_batch_size=2, rank=1, world_size=2)
    made = synthetic_batches("stage2", config, layout, 3)
    stream = build_stream("stage2", config, layout).batches(3)
    for _ in range(3):
        ours, theirs = next(made), next(stream)
        for name in ("source", "target"):
            assert torch.equal(ours[name]["numbers"], theirs[name]["numbers"])
            for key, value in theirs[name].items():
                if isinstance(value, torch.Tensor):
                    assert (ours[name][key].shape, ours[name][key].dtype) == (value.shape, value.dtype), key
    stream.close()
    assert len(synthetic_batch(config, [5])["source"]["labels"].unique()) > 1


@pytest.mark.parametrize("option", ["--num-steps=1", "--num-warmup=0", "--num-traced=-1"])
def test_too_few_steps_are_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["profile", option, "model=tiny", f"run_dir={tmp_path / 'run'}"]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("with_flops")
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_training_counts_the_arithmetic_of_each_step(scene_shards: Path, tmp_path: Path, log_every: int):
    """A warm start leaves out the teacher and the mixed images."""
    settings = ["stage1.trainer.num_steps=4", "stage1.objective.warm_start_steps=1", "stage2.trainer.num_steps=1"]
    overrides = [*scene_overrides(scene_shards, tmp_path), *settings, f"metrics.log_every={log_every}"]
    assert main(["train", *overrides, "data.validation.shards="]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = [line["flops_per_s_per_rank"] / line["samples_per_s"] for line in lines]
    config = load_config(overrides)
    adversarial = build_stage("stage2", config, torch.device("cpu"))
    assert counts.pop() == pytest.approx(flops_per_sample(adversarial, config, 0).total)
    stage = build_stage("stage1", config, torch.device("cpu"))
    early, late = (flops_per_sample(stage, config, step).total for step in (0, 3))
    assert early < 0.6 * late
    assert counts == pytest.approx([early, late, late, late] if log_every == 1 else [(early + 3 * late) / 4])


@pytest.mark.usefixtures("with_flops")
def test_work_that_cannot_be_counted_is_said_and_trained(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A backbone may call what has no rule; here, convolutions have none."""
    monkeypatch.setattr(flops_module, "UNKNOWN", {"conv2d"})
    settings = ["stages=[stage1]", "stage1.trainer.num_steps=1", "data.validation.shards="]
    assert main(["train", *scene_overrides(scene_shards, tmp_path), *settings]) == 0
    assert "stage1: no FLOPs and no MFU: FLOPs: torch's conv2d has no rule" in capsys.readouterr().out
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert not line.get("flops_per_s_per_rank") and "mfu" not in line
