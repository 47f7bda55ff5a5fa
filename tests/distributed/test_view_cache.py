"""A run has the same bits whether or not stage 2 finds its views in the cache; ranks and runs may share one."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_jobs
from tests.distributed.test_resume import STEPS, losses, overrides, stored

STOP = 4  # asked for before the fourth step: after a period of 2, and one more
HITS = "cache/hits"


def hits(run_dir: Path) -> list[float]:
    """The share of each step's micro-batches that was found."""
    return [step.pop(HITS) for _, _, step in losses(run_dir)]


def without_hits(run_dir: Path) -> list[Any]:
    return [(stage, step, {k: v for k, v in values.items() if k != HITS}) for stage, step, values in losses(run_dir)]


@pytest.mark.distributed
def test_a_run_is_the_same_with_an_empty_a_full_and_a_lost_cache(scene_shards: Path, tmp_path: Path) -> None:
    first = overrides(scene_shards, tmp_path / "first")

    def second(name: str, views: str = "views") -> list[str]:
        cache = ["stage2.cache.num_samples=8", f"stage2.cache.folder={tmp_path / views}"]
        run = [*overrides(scene_shards, tmp_path / name), "stages=[stage2]"]
        return [*run, f"stage1_from={tmp_path / 'first'}", *cache]

    jobs = [
        {"overrides": [*first, "stages=[stage1]"]},
        {"overrides": second("cold")},
        {"overrides": second("warm")},
        {"overrides": second("lost", "others"), "stop_at": STOP},
        {"overrides": second("lost", "new")},
    ]
    run_jobs(jobs, num_processes=2)
    run_jobs([{"overrides": second("alone")}], num_processes=1)
    assert hits(tmp_path / "cold")[:2] == [0, 0]
    assert hits(tmp_path / "lost")[:2] == hits(tmp_path / "lost")[STOP - 1 : STOP + 1] == [0, 0]
    assert hits(tmp_path / "warm") == hits(tmp_path / "alone") == [1] * STEPS
    for name in ("warm", "lost"):
        assert without_hits(tmp_path / name) == without_hits(tmp_path / "cold")
        one, other = (stored(tmp_path / run, "stage2") for run in (name, "cold"))
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    for (_, _, one), (_, _, two) in zip(losses(tmp_path / "alone"), losses(tmp_path / "cold"), strict=True):
        assert all(one[key] == pytest.approx(two[key], rel=2e-3, abs=2e-5) for key in one if key.startswith("loss"))
