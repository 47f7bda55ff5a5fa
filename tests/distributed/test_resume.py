"""N + M steps equal N, stop, resume, M, to the bit; and another division of the batch sees the same samples and
draws.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iccld.runtime.checkpoint.manifest import verify
from iccld.stages.diagnostics import CLASSES
from tests.distributed.launch import run_jobs
from tests.factory import scene_overrides

STEPS, STOP = 6, 3


def overrides(
    shards: Path, run_dir: Path, *, num_workers: int = 0, micro_batch_size: int = 1, steps: int = STEPS
) -> list[str]:
    settings = [
        f"stage{i}.trainer.{setting}"
        for i in (1, 2)
        for setting in (f"num_steps={steps}", "global_batch_size=4", f"micro_batch_size={micro_batch_size}")
    ]
    return [
        *scene_overrides(shards, run_dir),
        *settings,
        f"data.num_workers={num_workers}",
        "data.validation.shards=",
        "stage1.objective.confidence_threshold=0.06",
    ]


def losses(run_dir: Path) -> list[tuple[str, int, dict[str, float]]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timing = (
        "step_s",
        "samples_per_s",
        "data_wait",
        "data/",
        "time/",
        "flops_per_s",
        "mfu",
        "peak_gib",
        "slow_",
        "rank_",
    )
    return [
        (line.pop("stage"), line.pop("step"), {k: v for k, v in line.items() if not k.startswith(timing)})
        for line in lines
    ]


def stored(run_dir: Path, stage: str, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of a stage's last checkpoint: weights, moments, teacher."""
    return verify(run_dir / stage / "checkpoints" / f"step_{steps:08d}").reader.tensors("")


def assert_equal_weights(one: Path, two: Path) -> None:
    for stage in ("stage1", "stage2"):
        a, b = stored(one, stage), stored(two, stage)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), stage
        for weights in ("teacher", "student"):
            a, b = (load_file(run / stage / "final" / weights / "model.safetensors") for run in (one, two))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), (stage, weights)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "num_processes"),
    [
        ("ddp", 1),
        ("ddp", 2),
        ("ddp", 3),  # of two, sums do not depend on their order
        pytest.param("zero1", 3, marks=pytest.mark.slow),
        ("zero2", 2),
        pytest.param("zero2", 3, marks=pytest.mark.slow),
        ("fsdp2", 2),
        pytest.param("fsdp2", 3, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(
    scene_shards: Path, tmp_path: Path, engine: str, num_processes: int
):
    """Stages 1 and 2 accumulate (4 = 1 x 4 or 1 x 2 x 2; of three ranks 6 = 1 x 2 x 3).

    Under DDP, runs have 2 and 0 loader workers in turn; no engine sees where batches come from.
    """
    whole, stopped, switched = tmp_path / "whole", tmp_path / "stopped", tmp_path / "switched"
    batch = 6 if num_processes == 3 else 4

    def settings(run_dir: Path, *, num_workers: int = 0) -> list[str]:
        batches = [f"stage{i}.trainer.global_batch_size={batch}" for i in (1, 2)]
        return [*overrides(scene_shards, run_dir, num_workers=num_workers), *batches]

    jobs = [
        {"overrides": settings(whole)},
        {"overrides": settings(stopped), "stop_at": STOP},
        {"overrides": settings(stopped), "stop_at": STEPS},  # the rest of stage 1, half of stage 2
        {"overrides": settings(stopped)},
    ]
    with_workers = [
        {"overrides": settings(switched, num_workers=2), "stop_at": STOP},
        {"overrides": settings(switched, num_workers=0), "stop_at": STEPS + 1},
        {"overrides": settings(switched, num_workers=2)},
    ]
    others = [stopped, switched] if engine == "ddp" and num_processes < 3 else [stopped]
    run_jobs(jobs + with_workers * (switched in others), num_processes=num_processes, engine=engine)
    for other in others:
        assert losses(other) == losses(whole)
        assert_equal_weights(whole, other)
    events = [json.loads(line)["event"] for line in (stopped / "events.jsonl").read_text().splitlines()]
    assert events.count("preempted") == 2 and events.count("finished") == 2


def recorded(folder: Path) -> dict[tuple[str, int, int, int], dict[str, torch.Tensor]]:
    """Every prepared tensor by (stage, step, domain or view, sample number)."""
    samples = {}
    for path in sorted(folder.iterdir()):
        stage, step, _ = path.stem.split("_")
        tensors = torch.load(path, weights_only=True)
        numbers, keys = tensors.pop("numbers").tolist(), tensors.pop("keys")
        for name, tensor in tensors.items():
            if tensor.dim() == 0:
                continue
            if name == CLASSES:  # counts of a whole micro-batch
                continue
            views = tensor.unflatten(0, (-1, len(numbers)))  # stage 2 holds three domains, one after the other
            for i, number in enumerate(numbers):
                samples.setdefault((stage, int(step), number, keys[i]), {})[name] = views[:, i]
    return samples


@pytest.mark.distributed
def test_one_rank_with_four_samples_equals_two_ranks_with_two(scene_shards: Path, tmp_path: Path):
    steps = 8
    one, two = tmp_path / "one", tmp_path / "two"
    for run_dir, num_processes in ((one, 1), (two, 2)):
        job = {
            "overrides": overrides(scene_shards, run_dir, micro_batch_size=4 // num_processes, steps=steps),
            "record": str(run_dir) + "_inputs",
        }
        run_jobs([job], num_processes=num_processes)
    for (stage, step, a), (_, _, b) in zip(losses(one), losses(two), strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], rel=2e-3, abs=2e-5) for k in a if k.startswith("loss")), (stage, step)
    a, b = recorded(tmp_path / "one_inputs"), recorded(tmp_path / "two_inputs")
    assert a.keys() == b.keys() and len(a) == 2 * steps * 4
    drawn = {"source_images", "source_labels", "t", "noise", "domains"}  # what no weight has a part in
    for place, tensors in a.items():
        for name, tensor in tensors.items():
            if name in drawn or (place[0] == "stage1" and name == "mixed_images"):
                assert torch.equal(tensor, b[place][name]), (place, name)
            elif tensor.is_floating_point():
                torch.testing.assert_close(tensor, b[place][name], rtol=5e-2, atol=5e-3, msg=f"{place} {name}")
