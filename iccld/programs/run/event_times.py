"""Events of a run, read from `events.jsonl`, on a clock that only goes forward.

`time` is the clock that people and time servers set; it may jump, and the clocks of two nodes disagree. `up_s` counts
the seconds of one `boot` of one machine. It measures the time between two events of one boot. The clock measures the
time between others, which is never below zero, nor below the time of the steps that the events report.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from iccld.reading import MIB, is_count, read_limited

MAX_BYTES = 1024 * MIB
MOVED_S = 5.0  # a clock that moves by less is not reported
DAY_S = 86400.0  # longer than any start, and than ranks of one attempt may be apart
END_OF_TIME = 1e11

Event = Mapping[str, Any]


def read_events(run_dir: Path) -> tuple[list[Event], list[str]]:
    """Read the events; return also notes on those left out. Raises ValueError if there is no run."""
    path = run_dir / "events.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no run in {run_dir} (no events.jsonl); give a folder that train wrote.")
    lines = read_limited(path, MAX_BYTES).decode(errors="replace").split("\n")
    found = [_event(line) for line in lines if line.strip()]
    events = [event for event in found if event is not None]
    lost = len(found) - len(events)
    return events, [f"{lost} lines of {path} are torn or no events; they are left out"] if lost else []


def _event(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and _is_event(event) else None


def _is_event(event: Event) -> bool:
    kind, time = event.get("event"), event.get("time")
    if not isinstance(kind, str) or not _is_seconds(time):
        return False
    if kind == "launched":
        return _is_seconds(event.get("since", time))
    if kind in ("started", "progress") and not (isinstance(event.get("stage"), str) and is_count(event.get("step"))):
        return False
    if kind != "progress":
        return True
    seconds, num_steps = event.get("seconds"), event.get("num_steps")
    if not isinstance(seconds, dict) or "total" not in seconds or not is_count(num_steps) or num_steps == 0:
        return False
    return all(map(_is_seconds, seconds.values()))


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < END_OF_TIME


def straightened(events: Iterable[Event]) -> tuple[list[Event], list[str]]:
    """Return the events with times that only go forward, and notes on the clocks that have moved."""
    events = list(events)
    offsets: dict[str, list[float]] = {}
    for event in events:
        if boot := _boot(event):
            offsets.setdefault(boot, []).append(event["time"] - event["up_s"])
    notes = [
        f"the clock of a machine moved by {max(found) - min(found):,.0f} s while the run went on; counted without it"
        for found in offsets.values()
        if max(found) - min(found) > MOVED_S
    ]
    straight: list[Event] = []
    newest: dict[str, int] = {}  # the last event of each boot
    cursor, backwards = -math.inf, 0.0
    for number, event in enumerate(events):
        boot, before = _boot(event), events[number - 1] if number else event
        if boot in newest:
            last = newest[boot]
            time = straight[last]["time"] + event["up_s"] - events[last]["up_s"]
        elif number:
            gap = _gap(before, event, offsets)
            backwards = max(backwards, before["time"] - event["time"])
            time = straight[-1]["time"] + gap
        else:
            time = event["time"]
        least = cursor + event["seconds"]["total"] if event["event"] == "progress" else -math.inf
        time = max(time, straight[-1]["time"] if straight else time, least)
        straight.append({**event, "time": time, **_since(event, time)})
        cursor = cursor if event["event"] == "saved" else time
        if boot:
            newest[boot] = number
    if backwards > MOVED_S:
        notes.append(f"the clock goes back by {backwards:,.0f} s between two events; nothing is counted for that")
    return straight, notes


def _boot(event: Event) -> str:
    """Return the boot of a machine whose seconds the event counts; "" if it counts none."""
    boot = event.get("boot")
    return boot if isinstance(boot, str) and _is_seconds(event.get("up_s")) else ""


def _gap(before: Event, event: Event, offsets: Mapping[str, list[float]]) -> float:
    """Return the time between two events by the clock: the least that is possible if the clock was moved."""
    gaps = [later - earlier for later in _clocks(event, offsets) for earlier in _clocks(before, offsets)]
    gap = min((gap for gap in gaps if gap >= 0), default=0.0)
    return gap if event["event"] == "launched" or gap < DAY_S or not _boot(event) else 0.0


def _clocks(event: Event, offsets: Mapping[str, list[float]]) -> list[float]:
    """Return the clock's time at an event, and the time that it would have shown as it was set later."""
    boot = _boot(event)
    return [event["time"]] + ([event["up_s"] + offsets[boot][-1]] if boot else [])


def _since(event: Event, time: float) -> dict[str, float]:
    """Return when the launched attempt began; if the clock moved since, the launch itself."""
    if event["event"] != "launched":
        return {}
    lead = event["time"] - event.get("since", event["time"])
    return {"since": time - (lead if 0 <= lead < DAY_S else 0.0)}
