"""`iccld goodput RUN_DIR`: what became of a run's wall time, over all of its attempts; read from `events.jsonl`.

An attempt begins with `launched`; each line `progress` adds how many steps it made and the seconds of each phase. What
an attempt did after the step from which the next one went on had to be done again. What it did after its last
`progress`, where it was killed, nobody wrote down: it counts as down.
"""

import json
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from iccld.durable import make_folder, replacing, write_whole
from iccld.outcome import naming
from iccld.programs.run.event_times import Event, read_events, straightened

DESCRIPTION = """\
Show what became of the wall time of a run.

  iccld goodput runs/a
"""

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
"""What wall time is divided into; the sum is the whole. Productive is the first."""

REST = {"launched": "start", "started": "start", "preempted": "save", "finished": "other", "stopped": "other"}
"""What was done before each of these events, since the one before it."""

MAX_BARS = 30


@dataclass
class Attempt:
    """One process group's life. `seconds` by category; `down` is what passed since the attempt before it."""

    began: float
    ended: float
    num_steps: int = 0
    last: str = ""  # its last event
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))


def attempts(events: list[Event]) -> list[Attempt]:
    """The attempts of a run, oldest first; its events are `straightened`. Raises ValueError where none tells of any."""
    parts: list[list[Event]] = []
    for event in events:
        if event["event"] == "launched":
            parts.append([])
        if parts and not _is_of_scoring(event):
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


def _is_of_scoring(event: Event) -> bool:
    """Tell whether scoring told of it, perhaps days after the attempt."""
    return event["event"] == "warning" or (event["event"], event.get("stage")) == ("preempted", "evaluation")


def _resumed_at(later: Iterable[Event]) -> dict[str, int]:
    """For each stage, the step from which the next attempt that trained it went on."""
    steps: dict[str, int] = {}
    for event in later:
        if event["event"] == "started":
            steps.setdefault(event["stage"], event["step"])
    return steps


def _attempt(events: list[Event], resumed: Mapping[str, int], *, after: float) -> Attempt:
    """`after`: the end of the one before it, which the clock of another node may put later than the beginning."""
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
        elif kind in REST:
            attempt.seconds[REST[kind]] += seconds
        else:  # `saved` comes from the background, in the midst of a step
            continue
        cursor = max(event["time"], cursor)
    attempt.seconds["other"] += max(attempt.ended - cursor, 0.0)
    return attempt


def _steps(event: Event, resumed: int | None) -> dict[str, float]:
    """The seconds of the steps that one `progress` tells of, `resumed` being the step that their stage went on from."""
    seconds, num_steps = event["seconds"], event["num_steps"]
    redone = 0.0 if resumed is None else min(max((event["step"] - resumed) / num_steps, 0.0), 1.0)
    names = ("data", "save", "evaluate")
    share = (1 - redone) * min(seconds["total"] / max(sum(seconds.get(name, 0.0) for name in names), 1e-9), 1.0)
    kept = {name: share * seconds.get(name, 0.0) for name in names}
    training = max((1 - redone) * seconds["total"] - sum(kept.values()), 0.0)
    return {**kept, "training": training, "redone": redone * seconds["total"]}


def total_of(found: list[Attempt]) -> dict[str, float]:
    """The seconds of all attempts together, by category."""
    return {name: sum(attempt.seconds[name] for attempt in found) for name in CATEGORIES}


def tables_of(found: list[Attempt]) -> list[Table]:
    total = total_of(found)
    wall = max(sum(total.values()), 1e-9)
    title = f"goodput {100 * total['training'] / wall:.1f} % of {_hours(wall)} in {len(found)} attempts"
    overview = Table("", "h:mm:ss", "%", "", title=title)
    for name, (meaning, _) in CATEGORIES.items():
        overview.add_row(name, _hours(total[name]), f"{100 * total[name] / wall:.1f}", meaning)
    each = Table("launched", "down before", "steps", "redone", "lasted", "last event", title="attempts")
    for attempt in found:
        began = time.strftime("%F %T", time.localtime(attempt.began))
        lasted = attempt.ended - attempt.began
        redone = f"{100 * attempt.seconds['redone'] / max(lasted, 1e-9):.0f} % of its time"
        row = (_hours(attempt.seconds["down"]), str(attempt.num_steps), redone, _hours(lasted), attempt.last)
        each.add_row(began, *row)
    return [overview, each]


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def draw(found: list[Attempt], path: Path) -> None:
    """A bar for the whole and for each of the last attempts, as PNG."""
    from matplotlib.figure import Figure  # slow to import; a bare Figure needs no display

    shown = found[-MAX_BARS:]
    rows = [("all", total_of(found))]
    rows += [(f"attempt {len(found) - len(shown) + i}", attempt.seconds) for i, attempt in enumerate(shown, start=1)]
    figure = Figure(figsize=(11, 2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for name, (_, colour) in CATEGORIES.items():
        shares = [100 * seconds[name] / max(sum(seconds.values()), 1e-9) for _, seconds in rows]
        axes.barh([label for label, _ in rows], shares, left=left, color=colour, label=name, height=0.7)
        left = [begin + share for begin, share in zip(left, shares, strict=True)]
    axes.set(xlim=(0, 100), xlabel="% of wall time, an attempt's including the time down before it")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(CATEGORIES), frameon=False)
    with naming(path, "the figure"), replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of `iccld goodput`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for goodput.json and .png (RUN_DIR/profile)")


def run(arguments: Namespace) -> int:
    """Print the tables; write `goodput.json` and `goodput.png`. Raises ValueError where the user erred."""
    events, lost = read_events(arguments.run_dir)
    events, moved = straightened(events)
    found = attempts(events)
    folder = arguments.output or arguments.run_dir / "profile"
    total = total_of(found)
    wall = sum(total.values())
    figures = {
        "goodput": total["training"] / max(wall, 1e-9),
        "wall_s": wall,
        "seconds": total,
        "notes": [*lost, *moved],
        "attempts": [
            {"began": each.began, "ended": each.ended, "num_steps": each.num_steps, "seconds": each.seconds}
            for each in found
        ],
    }
    make_folder(folder, within=arguments.output or arguments.run_dir)
    write_whole(folder / "goodput.json", json.dumps(figures, indent=1) + "\n")
    draw(found, folder / "goodput.png")
    for table in tables_of(found):
        Console().print(table)
    for note in figures["notes"]:
        print(f"note: {note}")
    print(f"{folder / 'goodput.json'}, {folder / 'goodput.png'}")
    return 0
