"""Facts that a plan takes from `profile.json` of `iccld profile`."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ENGINES = ("ddp", "fsdp2", "zero1", "zero2")
WAITS = ("sync", "agree")
OVERLAPPED = "copy"  # beside the step
NORMAL = statistics.NormalDist()


@dataclass(frozen=True)
class Profile:
    """The slowest rank's seconds of a step by phase, waits for others left out, and what an engine moves."""

    engine: str
    stage: str
    device: str
    world_size: int
    micro_batch_size: int
    num_accumulation: int
    gradient_bytes: float
    teacher_bytes: float
    save_stall_s: float
    checkpoint_bytes: float
    phases: Mapping[str, float]  # `other` is what is between them
    spread: float  # standard deviation of the logarithm of a rank's step time

    @property
    def own_s(self) -> float:
        """A step but for waiting."""
        return sum(self.phases.values())


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises ValueError if the file is none, or one that cannot be taken apart."""
    try:
        profile = _profile(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a profile.json of `iccld profile` ({error!r}).") from error
    if profile.engine not in ENGINES or not profile.own_s > 0:
        raise ValueError(f"{path}: engine={profile.engine} with {profile.own_s:g} s of work a step cannot be scaled.")
    if profile.world_size > 1 and profile.engine != "ddp":
        raise ValueError(
            f"{path}: on {profile.world_size} ranks the phases of engine={profile.engine} contain its collectives; "
            f"profile it on one rank."
        )
    return profile


def _profile(figures: Mapping[str, Any]) -> Profile:
    waits = WAITS if figures["world_size"] > 1 else ()  # alone it waits for none, whatever the phase is called
    own = [
        statistics.median(rank["step_s"]) - sum(rank["phases"].get(name, 0.0) for name in waits)
        for rank in figures["ranks"]
    ]
    slowest_rank = figures["ranks"][own.index(max(own))]
    phases = {name: seconds for name, seconds in slowest_rank["phases"].items() if name not in (*WAITS, OVERLAPPED)}
    keys = ("engine", "stage", "device", "world_size", "micro_batch_size", "num_accumulation", "gradient_bytes")
    known: dict[str, Any] = {key: figures[key] for key in keys}
    known |= {key: figures.get(key) or 0.0 for key in ("teacher_bytes", "save_stall_s", "checkpoint_bytes")}
    return Profile(
        **known,
        phases={**phases, "other": max(own) - sum(phases.values())},
        spread=max(log_spread(rank["step_s"]) for rank in figures["ranks"]),
    )


def log_spread(seconds: Sequence[float]) -> float:
    """Return the spread of log-normal times from step to step, without the drift that all ranks share.

    It is estimated by the 90th percentile of the changes of their logarithms, which spread by the square root of 2
    more.
    """
    changes = [abs(math.log(after / before)) for before, after in pairwise(seconds)]
    if len(changes) < 2:
        return 0.0
    return statistics.quantiles(changes, n=10, method="inclusive")[8] / NORMAL.inv_cdf(0.95) / math.sqrt(2)


def slowest(num_ranks: int) -> float:
    """The expected largest of so many standard normals by Blom's formula; 0 of one."""
    return NORMAL.inv_cdf((num_ranks - 0.375) / (num_ranks + 0.25))
