"""Rates, utilisation and the slow rank, out of the ranks' seconds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from iccld.runtime.measure.profiling import BETWEEN_STEPS, OVERLAPPED, WAITING, Seconds

SLOW_RATIO = 1.1  # multiple of the median


class RankSeconds(NamedTuple):
    """A rank's seconds by phase, summed over the same steps as the others'; the most bytes it has held."""

    host: str
    seconds: Seconds
    peak_bytes: int


def own_seconds(seconds: Mapping[str, float]) -> float:
    """Return a rank's seconds of its steps, without its waits for others and without what is between steps."""
    return seconds["total"] - sum(seconds.get(name, 0.0) for name in (*WAITING, *BETWEEN_STEPS))


def rates(
    ranks: Sequence[RankSeconds], num_timed: int, *, global_batch_size: int, flops: float, peak_flops: float
) -> dict[str, Any]:
    """A line's facts on speed. `flops`: floating-point operations a sample; `peak_flops`: a rank's a second, or 0."""
    totals = [rank.seconds["total"] - sum(rank.seconds.get(name, 0.0) for name in BETWEEN_STEPS) for rank in ranks]
    total = max(*totals, 1e-9)
    samples_per_s = num_timed * global_batch_size / total
    achieved = flops * samples_per_s / len(ranks)
    names = sorted({name for rank in ranks for name in rank.seconds} - {"total"})
    return {
        "step_s": total / num_timed,
        "samples_per_s": samples_per_s,
        "samples_per_s_per_rank": samples_per_s / len(ranks),
        "data_wait": max(rank.seconds.get("data", 0.0) for rank in ranks) / total,
        "flops_per_s_per_rank": achieved,
        **({"mfu": achieved / peak_flops} if peak_flops else {}),
        "peak_gib": max(rank.peak_bytes for rank in ranks) / 2**30,
        **{f"time/{name}_s": _mean(ranks, name) / num_timed for name in names},
    }


def _mean(ranks: Sequence[RankSeconds], name: str) -> float:
    return statistics.fmean(rank.seconds.get(name, 0.0) for rank in ranks)


def slowest(ranks: Sequence[RankSeconds], num_timed: int) -> dict[str, Any]:
    """Describe the rank that the others wait for: in which phase it is behind, and each rank's own work a step."""
    own = [own_seconds(rank.seconds) for rank in ranks]
    slow = own.index(max(own))
    parts = [_own_parts(rank.seconds) for rank in ranks]
    behind = {
        name: seconds - statistics.median(part.get(name, 0.0) for part in parts[:slow] + parts[slow + 1 :])
        for name, seconds in parts[slow].items()
    }
    return {
        "slow_rank": slow,
        "slow_rank_host": ranks[slow].host,
        "slow_rank_phase": max(behind, key=lambda name: behind[name]),
        "slow_rank_over_others": own[slow] / max(statistics.median(own[:slow] + own[slow + 1 :]), 1e-9),
        "rank_own_s": [round(seconds / num_timed, 6) for seconds in own],
    }


def _own_parts(seconds: Mapping[str, float]) -> Seconds:
    """Return the parts whose sum is `own_seconds`; `other` is between the phases."""
    parts = {
        name: value for name, value in seconds.items() if name not in ("total", OVERLAPPED, *WAITING, *BETWEEN_STEPS)
    }
    return {**parts, "other": own_seconds(seconds) - sum(parts.values())}


def slow_rank_words(facts: Mapping[str, Any]) -> str:
    """Describe the slow rank for the terminal; "" if no rank is much slower than the others."""
    if facts.get("slow_rank_over_others", 0.0) < SLOW_RATIO:
        return ""
    rank, phase = f"rank {facts['slow_rank']} on {facts['slow_rank_host']}", facts["slow_rank_phase"]
    return f"  slow: {rank}, {facts['slow_rank_over_others']:.2f}x in {phase}"
