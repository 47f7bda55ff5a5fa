"""Plan from a profile: samples/s, step time and hours of a run on 1 to 4,096 GPUs under each engine.

    iccld profile experiment=gta5_to_cityscapes run_dir=runs/gta5
    python tools/scripts/plan_scaling.py runs/gta5/profile/stage2/profile.json --png plan.png --json plan.json

An engine that has a profile of its own among those given takes it, the others the first. The links are the nominal ones
of an H100 node unless given, or measured, under any launch of two or more processes, one on each end of the link:

    torchrun --nproc-per-node 2 tools/scripts/plan_scaling.py --measure-link --json inside.json
    python tools/scripts/plan_scaling.py PROFILE --link inside.json between.json

The batch grows with the GPUs, or, by `--global-batch`, stays: accumulation shrinks, and where a GPU would have less
than a micro-batch, the plan says so. The assumptions are printed; they name their sources.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from scaling.links import Link, Network, measure_link, nominal, read_link
from scaling.model import ASSUMPTIONS, Failures, predict
from scaling.profile import ENGINES, Profile, read_profile

GPUS = tuple(1 << n for n in range(13))
ALPHA_US = (5.0, 10.0)
GB_PER_S = (450.0, 50.0)  # NVLink 4, one way; an adapter of 400 Gb/s for each GPU
MTTF_H = 6000.0
"""Hours of a node of 8: 419 unexpected failures of 2,048 nodes in 54 days (The Llama 3 Herd of Models, 3.3.4)."""
HOUR = 3600.0
Row = dict[str, Any]


def plan(profiles: Sequence[Profile], network: Network, arguments: argparse.Namespace) -> list[Row]:
    """A row for each engine and number of GPUs; one that is not possible has `refused` for figures."""
    rows = []
    for engine in arguments.engines:
        profile = next((own for own in profiles if own.engine == engine), profiles[0])
        failures = Failures(
            node_mttf_s=HOUR * arguments.mttf_node_hours,
            restart_s=arguments.restart_s,
            stall_s=profile.save_stall_s,
            write_s=1e-9 * profile.checkpoint_bytes / arguments.storage_gb_per_s,
        )
        for num_ranks in arguments.gpus:
            row: Row = {"engine": engine, "num_ranks": num_ranks}
            try:
                one, step = (predict(profile, engine, network, n, arguments.global_batch) for n in (1, num_ranks))
            except ValueError as error:
                rows.append(row | {"refused": str(error)})
                continue
            slowdown = failures.slowdown(step.num_nodes, step.step_s)
            figures = {
                "step_s": step.step_s,
                "samples_per_s": step.samples_per_s,
                "efficiency": step.samples_per_s / (num_ranks * one.samples_per_s),
                "save_every_s": failures.interval_s(step.num_nodes, step.step_s),
                "goodput": 1 / slowdown,
                "hours": arguments.steps * step.step_s * slowdown / HOUR,
            }
            rows.append(row | asdict(step) | figures)
    return rows


def table_of(rows: Sequence[Row], title: str) -> Table:
    shares, run = ("work %", "links %", "slow %"), ("save min", "good- put %", "hours")
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for header in ("GPUs", "step s", *shares, "sent MB", "samples /s", "effi- cient %", *run):
        table.add_column(header.replace(" ", "\n"), justify="right")
    for row in rows:
        parts = [f"{abs(100 * row[key] / row['step_s']):.1f}" for key in ("own_s", "exposed_s", "straggler_s")]
        speed = [f"{row['sent_bytes'] / 1e6:.0f}", f"{row['samples_per_s']:.4g}", f"{100 * row['efficiency']:.1f}"]
        run = [f"{row['save_every_s'] / 60:.1f}", f"{100 * row['goodput']:.2f}", f"{row['hours']:.4g}"]
        table.add_row(str(row["num_ranks"]), f"{row['step_s']:.4g}", *parts, *speed, *run)
    return table


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Samples/s of the engines with the ideal line, and their efficiency, over GPUs, as PNG."""
    from matplotlib.figure import Figure  # slow to import; a bare Figure needs no display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, efficiency = figure.subplots(1, 2)
    gpus = sorted({row["num_ranks"] for row in rows})
    rate = max((row["samples_per_s"] / row["efficiency"] / row["num_ranks"] for row in rows), default=0.0)
    speed.plot(gpus, [rate * n for n in gpus], "--", color="#999999", label="ideal")
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        at = [row["num_ranks"] for row in own]
        style = "o:" if engine == "zero2" else "o-"  # often the same as zero1
        speed.plot(at, [row["samples_per_s"] for row in own], style, ms=3, label=engine)
        efficiency.plot(at, [100 * row["efficiency"] for row in own], style, ms=3, label=engine)
    speed.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="samples/s")
    efficiency.set(xscale="log", ylim=(0, 105), xlabel="GPUs", ylabel="efficiency, %")
    for axes in (speed, efficiency):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xscale("log", base=2)
    speed.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")


def network_of(arguments: argparse.Namespace) -> Network:
    """Measured or nominal links. Raises ValueError for both at once."""
    if not arguments.link:
        pairs = zip(arguments.alpha_us or ALPHA_US, arguments.gb_per_s or GB_PER_S, strict=True)
        inside, between = (nominal(alpha_us=us, gb_per_s=gb) for us, gb in pairs)
        return Network(inside, between, arguments.ranks_per_node)
    if arguments.alpha_us or arguments.gb_per_s or len(arguments.link) > 2:
        raise ValueError("--link takes one or two files, and no --alpha-us or --gb-per-s beside them.")
    links: list[Link] = [read_link(path) for path in arguments.link]
    return Network(links[0], links[-1], arguments.ranks_per_node)


def finite(value: Any) -> Any:
    """Return figures with None for what is infinite, as the hours of a run that never ends: JSON does not know it."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, two = parser.add_argument, ("INSIDE", "BETWEEN")
    add("profiles", nargs="*", type=Path, metavar="PROFILE", help="profile.json of `iccld profile`")
    add("--gpus", nargs="+", type=int, default=GPUS, help="default: 1 to 4,096")
    add("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="default: all")
    add("--steps", type=int, default=40_000, help="of the run (default %(default)s)")
    add("--global-batch", type=int, help="samples a step, the same on any number of GPUs")
    add("--ranks-per-node", type=int, default=8, help="GPUs of a node (default %(default)s)")
    add("--alpha-us", nargs=2, type=float, metavar=two, help=f"a message's latency (default {ALPHA_US})")
    add("--gb-per-s", nargs=2, type=float, metavar=two, help=f"each way, for each GPU (default {GB_PER_S})")
    add("--link", nargs="+", type=Path, metavar="FILE", help="measured: all links, or inside and between nodes")
    add("--measure-link", action="store_true", help="time the links between the ranks of this launch")
    add("--mttf-node-hours", type=float, default=MTTF_H, help="mean time to failure of a node (default %(default)g)")
    add("--restart-s", type=float, default=300.0, help="from a failure to the next step (default %(default)g)")
    add("--storage-gb-per-s", type=float, default=2.0, help="that checkpoints are written at (default %(default)g)")
    add("--json", type=Path, help="all figures")
    add("--png", type=Path, help="the plot")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for arguments that make no plan."""
    if not arguments.profiles:
        raise ValueError("give a profile.json of `iccld profile`, or --measure-link.")
    numbers = {"--gpus": min(arguments.gpus), "--steps": arguments.steps, "--ranks-per-node": arguments.ranks_per_node}
    numbers |= {"--global-batch": arguments.global_batch or 1, "--storage-gb-per-s": arguments.storage_gb_per_s}
    for name, value in numbers.items():
        if not value > 0:  # nor what is no number
            raise ValueError(f"{name} {value} must be above 0.")


def check_alike(profiles: Sequence[Profile]) -> None:
    """Raise ValueError if several profiles are not of one work under different engines."""
    for what in ("stage", "device", "micro_batch_size"):
        if len(found := {str(getattr(profile, what)) for profile in profiles}) > 1:
            raise ValueError(f"the profiles differ in {what} ({', '.join(sorted(found))}); plan one after another.")
    if len({profile.engine for profile in profiles}) < len(profiles):
        raise ValueError("two profiles are of one engine; give one for each.")


def main() -> None:
    arguments = parse()
    if arguments.measure_link:
        figures = measure_link()
        if os.environ.get("RANK") == "0":
            text = json.dumps(figures, indent=1) + "\n"
            arguments.json.write_text(text) if arguments.json else print(text)
        return
    check(arguments)
    profiles = [read_profile(path) for path in arguments.profiles]
    check_alike(profiles)
    network = network_of(arguments)
    rows = plan(profiles, network, arguments)
    console = Console()
    done = [row for row in rows if "refused" not in row]
    for engine in [engine for engine in arguments.engines if any(row["engine"] == engine for row in done)]:
        title = f"{engine}, {arguments.steps:,} steps"
        console.print(table_of([row for row in done if row["engine"] == engine], title))
    for reason in dict.fromkeys(row["refused"] for row in rows if "refused" in row):
        console.print(f"refused: {reason}", highlight=False)
    first = profiles[0]
    title = f"{first.stage} from {first.world_size} x {first.device}, {arguments.ranks_per_node} GPUs a node"
    links = "measured" if arguments.link else "nominal"
    console.print(f"{title}; links {links}; a node fails every {arguments.mttf_node_hours:g} h. It is assumed:")
    for line in ASSUMPTIONS:
        console.print(f"- {line}", highlight=False)
    if arguments.png:
        draw(done, arguments.png, title)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "png")}
        whole = {"plan": rows, "settings": settings, "assumptions": ASSUMPTIONS}
        arguments.json.write_text(json.dumps(finite(whole), indent=1, default=str) + "\n")
    if not done:
        sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"plan_scaling: {error}")
