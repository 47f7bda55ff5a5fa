"""Every engine on any number of ranks trains the same, and resumes the checkpoints of the others."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_jobs, run_on_two_nodes
from tests.distributed.test_resume import losses, overrides, stored

STEPS = 8
CHECKS: dict[str, list[tuple[str, ...]]] = {
    "ddp": [("engine_worker", "ddp"), ("step_worker",)],
    "zero1": [("engine_worker", "zero1"), ("zero_worker",)],
    "zero2": [("engine_worker", "zero2"), ("zero_worker",)],
    "fsdp2": [("engine_worker", "fsdp2")],
}
"""Modules by engine that assert what must hold of a step on two ranks, and their arguments."""
LOSS_TOLERANCE = {"rel": 2e-3, "abs": 2e-5}
# Splitting a batch changes the order of sums; AdamW divides by the gradient's size, so that the sign of a gradient near
# 0 may turn and move a weight by a whole learning rate. So what moved is compared as a whole, not weight by weight.
DRIFT_TOLERANCE = 0.1


def job(shards: Path, run_dir: Path, *, per_rank: int, num_accumulation: int = 1, stop_at: int | None = None) -> dict:
    settings = overrides(shards, run_dir, micro_batch_size=per_rank // num_accumulation, steps=STEPS)
    trainer = ("global_batch_size=8", f"checkpoint.save_every={STEPS // 2}")
    return {"overrides": [*settings, *(f"stage{i}.trainer.{s}" for i in (1, 2) for s in trainer)], "stop_at": stop_at}


@pytest.fixture(scope="module")
def one_process(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others are compared with."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    run_jobs([job(scene_shards, run_dir, per_rank=8)], num_processes=1)
    return run_dir


def assert_like(reference: Path, run_dir: Path) -> None:
    """The same losses at every step, and the same weights, moments and teacher at the end, to float tolerance."""
    for (stage, step, a), (_, _, b) in zip(losses(reference), losses(run_dir), strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], **LOSS_TOLERANCE) for k in a if k.startswith("loss")), (stage, step)
    for stage in ("stage1", "stage2"):
        for part, drift in drifts(reference, stored(run_dir, stage, STEPS), stage).items():
            assert drift < DRIFT_TOLERANCE, (stage, part, drift)


def drifts(reference: Path, other: dict[str, torch.Tensor], stage: str) -> dict[str, float]:
    """Return by part (module, moments, teacher) the distance from the reference, over its own late movement."""
    half, one = stored(reference, stage, STEPS // 2), stored(reference, stage, STEPS)
    assert one.keys() == other.keys() == half.keys()
    found = {}
    for part in ("module/", "exp_avg/", "exp_avg_sq/", "stage/"):
        names = [name for name in one if name.startswith(part) and one[name].is_floating_point()]
        a, b, before = (torch.cat([of[name].flatten() for name in names]) for of in (one, other, half))
        found[part] = float((a - b).norm() / (a - before).norm())
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("engine", CHECKS)
def test_two_ranks_train_as_one(scene_shards: Path, tmp_path: Path, one_process: Path, engine: str):
    """Both stages, a rank's half of the batch in two micro-batches; and what its `CHECKS` assert of single steps."""
    halves = job(scene_shards, tmp_path / "run", per_rank=4, num_accumulation=2)
    held = tmp_path / "held"
    held.mkdir()
    checks = [
        {"checks": f"tests.distributed.{module}", "arguments": [str(held), *arguments]}
        for module, *arguments in CHECKS[engine]
    ]
    run_jobs([halves, *checks], num_processes=2, engine=engine)
    assert_like(one_process, tmp_path / "run")
    assert len(list(held.iterdir())) == 2 * len(checks), "all was checked, on both ranks"


@pytest.mark.distributed
def test_a_run_goes_on_under_every_other_engine(scene_shards: Path, tmp_path: Path, one_process: Path):
    """One run in legs of a step, of 2, 1 and again 2 ranks, each from the checkpoint of the leg before.

    Every engine follows every other once; stage 2 begins in the second of the two legs of zero2.
    """
    launches = [
        (2, ["ddp", "zero1", "ddp", "zero2", "ddp"]),
        (1, ["fsdp2", "zero1", "zero2", "zero2", "zero1"]),
        (2, ["fsdp2", "zero2", "fsdp2"]),
    ]
    run_dir = tmp_path / "run"
    for ranks, engines in launches:
        leg = job(scene_shards, run_dir, per_rank=8 // ranks, stop_at=2)
        run_jobs([leg | {"engine": engine} for engine in engines], num_processes=ranks)
    run_jobs([job(scene_shards, run_dir, per_rank=4)], num_processes=2)
    assert_like(one_process, run_dir)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    moved = [(e["layout"]["engine"], e["new_layout"]["engine"]) for e in events if e["event"] == "converted"]
    assert {(a, b) for a in CHECKS for b in CHECKS if a != b} - set(moved) == set(), moved


@pytest.mark.distributed
def test_the_comparison_sees_what_stands_still(one_process: Path):
    """Weights, moments or a teacher that stopped half-way, or were lost, are far out of tolerance."""
    for stage in ("stage1", "stage2"):
        one, half = stored(one_process, stage, STEPS), stored(one_process, stage, STEPS // 2)
        for part in ("module/", "exp_avg/", "exp_avg_sq/", "stage/"):
            still = {name: half[name] if name.startswith(part) else tensor for name, tensor in one.items()}
            lost = {name: 0 * tensor if name.startswith(part) else tensor for name, tensor in one.items()}
            assert drifts(one_process, still, stage)[part] > 5 * DRIFT_TOLERANCE
            assert drifts(one_process, lost, stage)[part] > 5 * DRIFT_TOLERANCE


@pytest.mark.distributed
def test_two_machines_with_a_rank_each_train_as_one(scene_shards: Path, tmp_path: Path, one_process: Path):
    """The same file and experiment, started once a node."""
    settings = job(scene_shards, tmp_path / "run", per_rank=4)["overrides"]
    run_on_two_nodes("iccld", "train", *settings, engine="zero2")
    assert_like(one_process, tmp_path / "run")
