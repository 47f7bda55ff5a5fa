"""The benchmark of training: peers do the same work as ours on equal weights and inputs, and the guard sees a fall."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_train
import pytest
import torch
import training_peers.denoisers
from torch import Tensor, nn
from training_peers import processes
from training_peers.guard import regressions, unmeasured
from training_peers.peers import AdversarialDraws, DAFormerOrder, MixingDraws, TwoOptimisers
from training_peers.sizes import SIZES, Ours, config_of, make_stage, random_batch
from training_peers.steps import compare_cache, timing_share
from training_peers.turns import ratio_of, take_turns

from iccld import rng
from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import EngineConfig, Precision
from iccld.stages.base import Stage
from iccld.stages.settings import DOMAINS
from iccld.uda.photometric import NUM_DRAWS

ROOT = Path(__file__).parents[2]

TOY, CPU = SIZES["toy"], torch.device("cpu")
RATIOS = {"denoiser_over_diffusers": 1.2, "stage2_over_two_optimisers": 1.0, "data_wait": 0.01}
KEPT = {**RATIOS, "size": "cpu", "device_type": "cpu"}


def smooth(stage: Stage) -> Any:
    """AdamW's first step is the gradient's sign, which rounding turns where there is none; eps makes it continuous."""
    groups = stage.param_groups()
    for group in groups:
        group["eps"] = 1e-2
    stage.param_groups = lambda: groups  # type: ignore[method-assign]
    return stage


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def assert_equal_step(ours: Ours, theirs: Any, stages: tuple[Any, Any], draws: Any) -> None:
    """Check that both move the weights by the same, up to rounding."""
    mine, other = (stage.module for stage in stages)
    before = weights(mine)
    torch.testing.assert_close(before, weights(other), rtol=0, atol=0)
    ours()
    theirs(draws)
    moved, expected = weights(mine) - before, weights(other) - before
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_a_step_that_finds_its_views_is_compared_with_one_that_computes_them() -> None:
    found = compare_cache(TOY, Precision.fp32)
    assert found["ratio"] > 1 and found["filling_s"] > found["ours_s"] and found["entry_mib"] > 0


@pytest.mark.parametrize("reading", ["image", "mask"])
def test_the_loop_with_two_optimisers_does_the_work_of_stage_2(reading: str) -> None:
    config, batch = config_of(TOY, f"model.latent={reading}", "model.latent_channels=4"), random_batch(TOY)
    numbers = batch["source"]["numbers"]
    with Engine(EngineConfig()) as engine:
        stages = smooth(make_stage("stage2", config, CPU)), smooth(make_stage("stage2", config, CPU))
        ours, theirs = Ours(stages[0], engine, batch), TwoOptimisers(stages[1], batch)
        with torch.no_grad():
            tensors = stages[0].prepare(batch, 0).tensors
        strong = [uniform(NUM_DRAWS, f"stage2 strong view {domain}", numbers) for domain in DOMAINS]
        scores = uniform(stages[0].model.num_classes, "stage2 classmix", numbers)
        draws = AdversarialDraws(scores, torch.cat(strong), tensors["t"], tensors["noise"])
        for mine, other in zip(("z_t", "condition", "domains"), theirs._prepare(draws), strict=True):
            torch.testing.assert_close(tensors[mine], other)
        assert_equal_step(ours, theirs, stages, draws)
        engine.detach()
    averages = [weights(stage.teacher.module) for stage in stages]
    torch.testing.assert_close(*averages, rtol=0, atol=1e-6)


def test_daformers_order_does_the_work_of_stage_1() -> None:
    """Only the first step is compared: after it, the teachers differ by a step's average."""
    config, batch = config_of(TOY), random_batch(TOY)
    numbers = batch["target"]["numbers"]
    with Engine(EngineConfig()) as engine:
        stages = smooth(make_stage("stage1", config, CPU)), smooth(make_stage("stage1", config, CPU))
        ours, theirs = Ours(stages[0], engine, batch), DAFormerOrder(stages[1], batch)
        draws = MixingDraws(
            uniform(stages[0].num_classes, "classmix", numbers), uniform(NUM_DRAWS, "photometric", numbers)
        )
        assert_equal_step(ours, theirs, stages, draws)
        theirs()  # the average moves from the second step on
        engine.detach()
    assert not torch.equal(weights(stages[1].teacher.module), weights(make_stage("stage1", config, CPU).teacher.module))


def uniform(count: int, purpose: str, numbers: Tensor) -> Tensor:
    return rng.uniform(count, seed=0, purpose=purpose, numbers=numbers)


@pytest.mark.parametrize("name", SIZES)
def test_the_unets_have_as_many_parameters_and_see_the_same(name: str) -> None:
    with torch.device("meta"):
        passes = training_peers.denoisers.contenders(SIZES[name], torch.device("meta"), compiled=False)
    mine, other = passes.values()
    assert all(a is b for a, b in zip(mine.inputs, other.inputs, strict=True))
    counts = [training_peers.denoisers.num_parameters(one.module) for one in passes.values()]
    assert abs(counts[1] / counts[0] - 1) <= training_peers.denoisers.TOLERANCE
    attention = [
        {m.in_features for m in one.module.modules() if isinstance(m, nn.Linear) and m.out_features == m.in_features}
        for one in passes.values()
    ]
    assert len(attention[0]) == len(attention[1])  # as many widths have attention
    z_t = mine.inputs[0]
    assert mine.predict(*mine.inputs[:3]).shape == other.predict(*mine.inputs[:3]).shape == z_t.shape


def test_turns_alternate_and_ratios_are_of_the_same_round() -> None:
    said: list[str] = []
    seconds = take_turns({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, CPU, rounds=2)
    assert said == [*"aabb", *"ab", *"ba"] and [len(own) for own in seconds.values()] == [2, 2]
    found = ratio_of([1.0, 2.0, 1.0], [2.0, 2.0, 3.0])
    assert (found["ratio"], found["low"], found["high"]) == (2.0, 1.5, 2.5) and found["ours_s"] == 1.0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ""),
        ({"denoiser_over_diffusers": 1.09}, ""),
        ({"denoiser_over_diffusers": 1.07}, "denoiser_over_diffusers: 1.200 -> 1.070, 11% less"),
        ({"denoiser_over_diffusers": 2.0, "data_wait": 0.029}, ""),
        ({"data_wait": 0.04}, "data_wait: 0.010 -> 0.040, 0.030 more"),
    ],
)
def test_the_guard_names_what_is_worse(changed: dict[str, float], words: str) -> None:
    assert regressions(KEPT, {**KEPT, **changed}) == ([words] if words else [])


def test_the_guard_compares_like_with_like_and_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="size of the kept ratios is cpu, of these toy"):
        regressions(KEPT, {**KEPT, "size": "toy"})
    partial = {name: value for name, value in KEPT.items() if name != "data_wait"}
    assert not regressions(KEPT, partial) and unmeasured(KEPT, partial) == ["data_wait"]


def test_an_earlier_run_can_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name, figures in (("kept", KEPT), ("now", {**KEPT, "stage2_over_two_optimisers": 0.8})):
        (tmp_path / name).write_text(json.dumps(figures))
    command = ["bench_train", "--check", str(tmp_path / "kept"), "--against"]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "now")])
    assert bench_train.main() == 1
    assert "worse: stage2_over_two_optimisers: 1.000 -> 0.800, 20% less" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "kept")])
    assert bench_train.main() == 0


def test_the_toy_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The cheapest figure is of a process of its own, as all are; the others are of this one."""
    apart = bench_train.in_own_process

    def measured(num_threads: int, function: Any, *given: Any, **options: Any) -> dict[str, Any]:
        if function is timing_share:
            return apart(num_threads, function, *given, **options)
        return function(*given, **options)

    monkeypatch.setattr(bench_train, "in_own_process", measured)
    command = ["bench_train", "--size", "toy", "--rounds", "1", "--no-compiled"]
    parts = ["--parts", "denoiser", "steps", "attention"]
    monkeypatch.setattr(sys, "argv", [*command, *parts, "--json", str(tmp_path / "figures.json")])
    assert bench_train.main() == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name in ("denoiser_over_diffusers", "stage2_over_two_optimisers", "stage1_over_daformer_order"):
        assert figures[name] > 0 and figures["details"][name]["ours_s"] > 0
    assert ("stage1_over_daformer_order_equal_precision" in figures) == (figures["precision"] == "bf16")
    assert figures["versions"]["torch"] and figures["command"].endswith("figures.json")
    printed = " ".join(capsys.readouterr().out.split())
    assert "goal" in printed
    if not torch.cuda.is_available():
        assert "needs a CUDA device" in printed and "xformers_over_sdpa" not in figures


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_and_real_runs_are_measured(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "tools" / "benchmarks" / "bench_train.py"),
        "--size",
        "toy",
        "--json",
        "figures.json",
    ]
    command += ["--parts", "scaling", "data"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert not done.returncode, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert min(figures["weak_scaling_2"], figures["weak_scaling_2_over_independent"]) > 0
    assert 0 <= figures["data_wait"] < 1 and figures["details"]["data_wait"]["stage2"]["step_s"] > 0


@pytest.mark.gpu
def test_a_gpu_also_gets_rates_memory_and_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        "bench_train",
        "--size",
        "toy",
        "--parts",
        "attention",
        "device",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_train.main() == 0
    details = json.loads((tmp_path / "figures.json").read_text())["details"]
    for name in ("stage1_eager", "stage1_compiled", "stage2_eager", "stage2_compiled"):
        assert min(details[name][key] for key in ("samples_per_s", "flops", "peak_gib")) > 0
    found = details["xformers_over_sdpa"]
    assert "skipped" in found or found["faster"] == ("xformers" if found["ratio"] > 1 else "sdpa")


def test_one_gpu_is_not_measured_as_two_cpu_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert processes.weak_scaling("stage1", "toy") == {"skipped": "scaling needs 2 GPUs, and there is 1"}
