"""`iccld goodput RUN_DIR`: tables and a figure of what became of a run's wall time, over all of its attempts."""

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.table import Table

from iccld.durable import make_folder, replacing, write_whole
from iccld.outcome import naming
from iccld.programs.run.event_times import read_events, straightened
from iccld.programs.run.ledger import CATEGORIES, Attempt, attempts, hours, total_of
from iccld.tables import cell, table_console
from iccld.texts import shown

DESCRIPTION = """\
Show what became of the wall time of a run.

  iccld goodput runs/a
"""

MAX_BARS = 30


def tables_of(found: list[Attempt]) -> list[Table]:
    total = total_of(found)
    wall = max(sum(total.values()), 1e-9)
    title = f"goodput {100 * total['training'] / wall:.1f} % of {hours(wall)} in {len(found)} attempts"
    overview = Table("", "h:mm:ss", "%", "", title=title)
    for name, (meaning, _) in CATEGORIES.items():
        overview.add_row(name, hours(total[name]), f"{100 * total[name] / wall:.1f}", meaning)
    each = Table("launched", "down before", "steps", "redone", "lasted", "last event", title="attempts")
    for attempt in found:
        began = time.strftime("%F %T", time.localtime(attempt.began))
        lasted = attempt.ended - attempt.began
        redone = f"{100 * attempt.seconds['redone'] / max(lasted, 1e-9):.0f} % of its time"
        row = (hours(attempt.seconds["down"]), str(attempt.num_steps), redone, hours(lasted), cell(attempt.last))
        each.add_row(began, *row)
    return [overview, each]


def draw(found: list[Attempt], path: Path) -> None:
    """Draw a bar for the whole and for each of the last attempts, as PNG."""
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
    """Add the arguments of `iccld goodput`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for goodput.json and .png (RUN_DIR/profile)")


def run(arguments: Namespace) -> int:
    """Print the tables; write `goodput.json` and `goodput.png`. Raises ValueError if the user erred."""
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
        table_console().print(table)
    for note in figures["notes"]:
        print(f"note: {shown(note)}")
    print(f"{folder / 'goodput.json'}, {folder / 'goodput.png'}")
    return 0
