"""Contenders take turns, so that whatever else the machine does hits all of them; ratios are of the same round."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from iccld.runtime.measure.peaks import wait_for

NUM_WARMUP = 2


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time; of one thread on a CPU the processor's time, which knows nothing of what else the machine does."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    wait_for(device)
    started = clock()
    call()
    wait_for(device)
    return clock() - started


def take_turns(
    contenders: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a call of each contender in each round; who begins changes from round to round."""
    for call in contenders.values():
        for _ in range(NUM_WARMUP):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders.items())
        for name, call in order if number % 2 == 0 else reversed(order):
            seconds[name].append(seconds_of(call, device))
    return seconds


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and their quartiles."""
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def ratio_of(ours: Sequence[float], theirs: Sequence[float], **facts: Any) -> dict[str, Any]:
    """Return how much faster ours is, from seconds round by round; with the medians and further facts."""
    own = spread([other / mine for mine, other in zip(ours, theirs, strict=True)])
    return {**own, "ours_s": statistics.median(ours), "theirs_s": statistics.median(theirs), **facts}
