"""Charts of a grid: the IoU of each class, a bar a run, with its standard error."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from iccld.durable import replacing
from iccld.outcome import naming
from iccld.programs.ablate.paired import Estimate

MAX_RUNS = 6  # the most runs in a chart
COLOURS = ("#9a9a9a", "#2a7f62", "#e0a526", "#7aa6c2", "#8063a8", "#c23b3b")
"""Colours of the runs; the first is the baseline's."""


def charts(rows: Mapping[str, Mapping[str, Estimate]], baseline: str) -> Iterator[dict[str, Mapping[str, Estimate]]]:
    """Yield the rows of each chart, the baseline in all of them; rows without scores are left out."""
    others = [name for name, classes in rows.items() if classes and name != baseline]
    first = {baseline: rows[baseline]} if rows[baseline] else {}
    size = MAX_RUNS - len(first)
    for start in range(0, max(len(others), len(first)), size):
        yield first | {name: rows[name] for name in others[start : start + size]}


def draw_classes(rows: Mapping[str, Mapping[str, Estimate]], baseline: str, *, folder: Path) -> list[str]:
    """Write `classes_1.png`, ...; return their names."""
    names: list[str] = []
    for number, shown in enumerate(charts(rows, baseline), start=1):
        names.append(f"classes_{number}.png")
        _draw(shown, folder / names[-1], colours=COLOURS if baseline in shown else COLOURS[1:] + COLOURS[:1])
    return names


def _draw(rows: Mapping[str, Mapping[str, Estimate]], path: Path, *, colours: tuple[str, ...]) -> None:
    from matplotlib.figure import Figure  # slow to import; a bare Figure needs no display

    classes = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure = Figure(figsize=(max(8.0, 0.75 * len(classes)), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for number, ((name, row), colour) in enumerate(zip(rows.items(), colours, strict=False)):
        places = [i + (number - (len(rows) - 1) / 2) * width for i, c in enumerate(classes) if c in row]
        shown = [row[c] for c in classes if c in row]
        errors = [math.nan if value.se is None else value.se for value in shown]
        style: dict[str, Any] = {"color": colour, "ecolor": "#222222", "error_kw": {"elinewidth": 1, "capsize": 2}}
        axes.bar(places, [value.mean for value in shown], width, yerr=errors, label=name, **style)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", parse_math=False)
    axes.set(ylabel="IoU, %", xlim=(-0.6, len(classes) - 0.4), title=_title(rows))
    axes.set_ylim(bottom=0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(rows), 3), frameon=False)
    with naming(path, "the chart"), replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _title(rows: Mapping[str, Mapping[str, Estimate]]) -> str:
    numbers = {value.n for row in rows.values() for value in row.values()}
    most = max(numbers, default=0)
    if most < 2:
        return "one seed: the spread is unknown"
    return f"mean and standard error over up to {most} seeds"
