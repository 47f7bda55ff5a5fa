"""Report of a profile: table, JSON and picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from iccld.durable import replacing, write_whole
from iccld.outcome import naming
from iccld.reading import GIB
from iccld.runtime.measure.profiling import BETWEEN_STEPS, OVERLAPPED, PHASES, WAITING
from iccld.tables import table_console

COLOURS = {
    "data": "#e0a526",
    "agree": "#d9d9d9",
    "prepare": "#7aa6c2",
    "forward": "#2a7f62",
    "backward": "#1c5a45",
    "sync": "#c23b3b",
    "optimizer": "#8063a8",
    "average": "#b59ad6",
    "other": "#b5b5b5",
}
MEANINGS = {
    "data": "waiting for a batch",
    "agree": "waiting for other ranks",
    "prepare": "teacher, mixing, noise",
    "forward": "",
    "backward": "own part",
    "sync": "until all gradients are there",
    "optimizer": "clip and update",
    "average": "the teacher's update",
    "other": "between the phases",
    OVERLAPPED: "to the device, beside the rest",
}
MAX_COLUMNS = 4
MAX_BARS = 32
Figures = Mapping[str, Any]


def write_report(figures: Figures, folder: Path) -> None:
    """Print the table, and write profile.json and profile.png. On one rank."""
    write_whole(folder / "profile.json", json.dumps(figures, indent=1) + "\n")
    draw(figures, folder / "profile.png")
    console = table_console()
    for table in (ranks_table(figures), parts_table(figures)):
        console.print(table)
    traces = ", a trace a rank (chrome://tracing, ui.perfetto.dev)" if figures["ranks"][0]["trace"] else ""
    print(f"{folder}: profile.json, profile.png{traces}", flush=True)


def title_of(figures: Figures) -> str:
    batch = f"{figures['global_batch_size']} = {figures['world_size']} x {figures['num_accumulation']} x "
    compiled = "" if figures["compile"] == "none" else f", compiled {figures['compile']}"
    mode = f"{figures['engine']}, {figures['precision']}{compiled}"
    made = "synthetic batches" if figures["synthetic"] else "real data"
    return f"{figures['stage']} on {figures['device']}: {mode}, batch {batch}{figures['micro_batch_size']}, {made}"


def rates_of(figures: Figures) -> str:
    return (
        f"{figures['step_s']:.3g} s a step, {figures['samples_per_s']:.3g} samples/s, "
        f"{figures['samples_per_s_per_rank']:.3g} a rank, "
        f"{figures['achieved_flops_per_rank'] / 1e12:.3g} TFLOP/s a rank, "
        f"MFU {100 * figures['mfu']:.1f} % ({figures['peak_source']})"
    )


def phases_of(rank: Figures) -> dict[str, float]:
    """Return the seconds a step; `other` is what is between the phases. What is overlapped is left out."""
    known = {name: rank["phases"][name] for name in PHASES if name not in BETWEEN_STEPS}
    median = sorted(rank["step_s"])[len(rank["step_s"]) // 2]
    return {**known, "other": max(median - sum(known.values()), 0.0)}


def slow_rank(figures: Figures) -> int:
    """Return the rank whose own work takes longest, waiting left out."""
    own = [sum(s for name, s in phases_of(rank).items() if name not in WAITING) for rank in figures["ranks"]]
    return own.index(max(own))


def ranks_table(figures: Figures) -> Table:
    """Make a table of the first ranks and the slowest; all are in profile.json."""
    slow = slow_rank(figures)
    shown = [rank for rank in figures["ranks"] if rank["rank"] < MAX_COLUMNS - 1 or rank["rank"] == slow]
    table = Table("ms a step, medians", title=f"{title_of(figures)}\n{rates_of(figures)}")
    for rank in shown:
        mark = "\nslowest" if rank["rank"] == slow and len(figures["ranks"]) > 1 else ""
        table.add_column(f"rank {rank['rank']}\n{rank['host']}{mark}", justify="right")
    for name, meaning in MEANINGS.items():
        of_ranks = [rank["phases"][name] if name == OVERLAPPED else phases_of(rank)[name] for rank in shown]
        table.add_row(f"{name}: {meaning}".rstrip(": "), *(f"{1000 * seconds:.1f}" for seconds in of_ranks))
    table.add_row("peak memory, GiB", *(f"{rank['peak_bytes'] / GIB:.2f}" for rank in shown))
    return table


def parts_table(figures: Figures) -> Table:
    title = "GFLOP a sample; of a micro-batch's forward passes, FLOP a byte, ms and GFLOP/s"
    table = Table("part", title=title)
    for header in ("prepare", "forward", "backward", "FLOP/B", "ms", "GFLOP/s"):
        table.add_column(header, justify="right")
    timed = figures["roofline"]["parts"]
    for part, flops in figures["flops_by_part"].items():
        cells = [f"{flops[kind] / 1e9:.3g}" for kind in ("prepare", "forward", "backward")]
        if part in timed:
            own = timed[part]
            intensity = own["flops"] / own["bytes"]
            cells += [f"{intensity:.3g}", f"{1000 * own['seconds']:.3g}", f"{own['flops_per_s'] / 1e9:.3g}"]
        table.add_row(part, *cells)
    return table


def draw(figures: Figures, path: Path) -> None:
    """Draw bars of a step a rank, memory a rank, and the roofline, as PNG."""
    from matplotlib.figure import Figure  # slow to import; a bare Figure needs no display

    shown = figures["ranks"][:MAX_BARS]
    figure = Figure(figsize=(15, 4 + 0.25 * len(shown)), layout="constrained")
    steps, held, roof = figure.subplots(1, 3, width_ratios=(1.3, 1, 1.1))
    figure.suptitle(f"{title_of(figures)}\n{rates_of(figures)}", fontsize=10)
    labels = [f"rank {rank['rank']}" for rank in shown]
    bars = {name: [1000 * phases_of(rank)[name] for rank in shown] for name in COLOURS}
    _stack(steps, labels, bars, [COLOURS[name] for name in bars])
    steps.set(xlabel="ms a step", title="a step")
    parts = list(shown[0]["held_bytes"])
    memory = {part: [rank["held_bytes"].get(part, 0) / GIB for rank in shown] for part in parts}
    rest = [rank["peak_bytes"] / GIB - sum(memory[part][i] for part in parts) for i, rank in enumerate(shown)]
    memory["activations and the rest"] = [max(size, 0.0) for size in rest]
    _stack(held, labels, memory, None)
    held.set(xlabel="GiB at the peak", title="memory")
    _draw_roofline(roof, figures["roofline"])
    with naming(path, "the figure"), replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _stack(axes: Any, labels: list[str], bars: Mapping[str, list[float]], colours: list[str] | None) -> None:
    left = [0.0] * len(labels)
    for i, (name, sizes) in enumerate(bars.items()):
        colour = {"color": colours[i]} if colours else {}
        axes.barh(labels, sizes, left=left, label=name, height=0.7, **colour)
        left = [begin + size for begin, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False, fontsize=8)


def _draw_roofline(axes: Any, roofline: Figures) -> None:
    limits, parts = roofline["limits"], roofline["parts"]
    ridge = limits["flops_per_s"] / limits["bytes_per_s"]
    at = [own["flops"] / own["bytes"] for own in parts.values()] or [ridge]
    low, high = min(*at, ridge) / 4, max(*at, ridge) * 4
    roof = [min(limits["flops_per_s"], limits["bytes_per_s"] * x) / 1e9 for x in (low, ridge, high)]
    axes.loglog([low, ridge, high], roof, color="#444444")
    for (part, own), x in zip(parts.items(), at, strict=False):
        axes.loglog(x, own["flops_per_s"] / 1e9, "o", label=part)
    axes.set(xlabel="FLOP a byte (unfused)", ylabel="GFLOP/s", title="roofline of the forward passes")
    axes.spines[["top", "right"]].set_visible(False)
    if parts:
        axes.legend(frameon=False, fontsize=8)
