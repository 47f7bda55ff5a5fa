"""The ledger of a run: what became of its wall time, attempt by attempt, as `events.jsonl` tells.

An attempt begins with the event `launched`. Each event `progress` adds a number of steps and the seconds of each phase.
The steps that an attempt did after the one from which a later attempt resumed had to be done again. An attempt that
was killed wrote nothing down after its last `progress`; that time counts as down.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from iccld.programs.run.event_times import Event

CATEGORIES = {
    "training": ("steps that count", "#2a7f62"),
    "data": ("in them, waiting for data", "#e0a526"),
    "evaluate": ("scores in mid-training", "#7aa6c2"),
    "save": ("steps waiting for checkpoints", "#8063a8"),
    "redone": ("steps done again after a restart", "#c23b3b"),
    "start": ("from the launch, and between stages, to the first step", "#9c6b4e"),
    "other": ("hand-over, final scores, logging", "#b5b5b5"),
    "down": ("no attempt ran, or none wrote it down: queue, requeue, crash", "#e3e3e3"),
}
"""Categories of wall time; their sum is the whole. The first is productive."""

BEFORE = {"launched": "start", "started": "start", "preempted": "save", "finished": "other", "stopped": "other"}
"""Category of the time before each of these events, since the event before it."""


@dataclass
class Attempt:
    """One process group's life. `seconds` by category; `down` is the time since the attempt before it."""

    began: float
    ended: float
    num_steps: int = 0
    last: str = ""  # its last event
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))


def attempts(events: list[Event]) -> list[Attempt]:
    """Divide a run's `straightened` events into attempts, oldest first. Raises ValueError if they tell of none."""
    parts: list[list[Event]] = []
    for event in events:
        if event["event"] == "launched":
            parts.append([])
        if parts and not is_of_scoring(event):
            parts[-1].append(event)
    if not parts:
        raise ValueError("events.jsonl holds no event `launched`: nothing has been started, or by an older version.")
    found: list[Attempt] = []
    for number, part in enumerate(parts):
        resumed = _resumed_at(event for others in parts[number + 1 :] for event in others)
        found.append(_attempt(part, resumed, after=found[-1].ended if found else -math.inf))
        if number:
            found[-1].seconds["down"] = found[-1].began - found[-2].ended
    return found


def is_of_scoring(event: Event) -> bool:
    """Tell whether scoring told of it, perhaps days after the attempt."""
    return event["event"] == "warning" or (event["event"], event.get("stage")) == ("preempted", "evaluation")


def _resumed_at(later: Iterable[Event]) -> dict[str, int]:
    """Return, for each stage, the earliest step from which a later attempt resumed it: what came after is done again.

    The next attempt need not have gone back furthest: a damaged checkpoint, or `--extend`, takes a later one further.
    """
    steps: dict[str, int] = {}
    for event in later:
        if event["event"] == "started":
            steps[event["stage"]] = min(event["step"], steps.get(event["stage"], event["step"]))
    return steps


def _attempt(events: list[Event], resumed: Mapping[str, int], *, after: float) -> Attempt:
    """Account for one attempt; `after` is the end of the one before it.

    The clock of another node may put that end later than this attempt's beginning.
    """
    began = cursor = max(events[0].get("since", events[0]["time"]), after)
    ended = max(began, *(event["time"] for event in events))
    attempt = Attempt(began, ended, last=events[-1]["event"])
    for event in events:
        seconds, kind = max(event["time"] - cursor, 0.0), event["event"]
        if kind == "progress":
            inside = event["seconds"]["total"]
            attempt.seconds["other"] += max(seconds - inside, 0.0)
            for name, share in _steps(event, resumed.get(event["stage"])).items():
                attempt.seconds[name] += share
            attempt.num_steps += event["num_steps"]
        elif kind in BEFORE:
            attempt.seconds[BEFORE[kind]] += seconds
        else:  # the background writes `saved` in the midst of a step
            continue
        cursor = max(event["time"], cursor)
    attempt.seconds["other"] += max(attempt.ended - cursor, 0.0)
    return attempt


def _steps(event: Event, resumed: int | None) -> dict[str, float]:
    """Divide the seconds of one `progress`; `resumed` is the step from which the stage was resumed later."""
    seconds, num_steps = event["seconds"], event["num_steps"]
    redone = 0.0 if resumed is None else min(max((event["step"] - resumed) / num_steps, 0.0), 1.0)
    names = ("data", "save", "evaluate")
    share = (1 - redone) * min(seconds["total"] / max(sum(seconds.get(name, 0.0) for name in names), 1e-9), 1.0)
    kept = {name: share * seconds.get(name, 0.0) for name in names}
    training = max((1 - redone) * seconds["total"] - sum(kept.values()), 0.0)
    return {**kept, "training": training, "redone": redone * seconds["total"]}


def total_of(found: list[Attempt]) -> dict[str, float]:
    """Sum the seconds of all attempts, by category."""
    return {name: sum(attempt.seconds[name] for attempt in found) for name in CATEGORIES}


def hours(seconds: float) -> str:
    """Write a duration as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
