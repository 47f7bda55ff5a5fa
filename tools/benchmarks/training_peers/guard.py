"""The goals of bench_train.py, and its guard: which ratios are worse than those that the repository keeps."""

from collections.abc import Mapping
from typing import Any

FALL = 0.1  # of a ratio
RISE = 0.02  # of a share of the step's time, in points
GOALS = {
    "denoiser_over_diffusers": {"cpu": 1.0, "cuda": 1.2},
    "denoiser_over_diffusers_compiled": {"cpu": 1.0, "cuda": 1.2},
    "stage2_over_two_optimisers": {"cpu": 1.2, "cuda": 1.2},
    "stage2_over_two_optimisers_mask": {"cpu": 1.2, "cuda": 1.2},
    "stage1_over_daformer_order": {"cpu": 1.3, "cuda": 1.3},
    "stage1_over_daformer_order_equal_precision": {},
    "stage2_cached_over_not": {},
    "weak_scaling_2": {"cpu": 0.95, "cuda": 0.95},
    "weak_scaling_2_over_independent": {},
    "data_wait": {"cpu": 0.02, "cuda": 0.02},
    "timing_share": {"cpu": 0.005, "cuda": 0.005},
    "xformers_over_sdpa": {},
}
"""The figures, and what each should reach, by the device's type."""
SHARES = ("data_wait", "timing_share")  # where less is better; of all others, more is


def is_met(name: str, value: float, goal: float) -> bool:
    return value <= goal if name in SHARES else value >= goal


def regressions(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each kept ratio that is worse now. Raises ValueError if the two runs are not of a kind."""
    for key in ("size", "device_type", "threads", "precision"):
        if kept.get(key) != now.get(key):
            found = f"{key} of the kept ratios is {kept.get(key)}, of these {now.get(key)}"
            raise ValueError(f"--check: {found}; compare like with like.")
    return [worse for name in GOALS if name in kept and name in now if (worse := _worse(name, kept[name], now[name]))]


def unmeasured(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in GOALS if name in kept and name not in now]


def _worse(name: str, old: float, new: float) -> str:
    if name in SHARES:
        return f"{name}: {old:.3f} -> {new:.3f}, {new - old:.3f} more" if new - old > RISE else ""
    return f"{name}: {old:.3f} -> {new:.3f}, {1 - new / old:.0%} less" if new < (1 - FALL) * old else ""
