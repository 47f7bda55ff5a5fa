"""Everything that only a GPU can show, part by part; `tools/gpu.sh` prepares the machine and calls this.

    python tools/gpu.py FOLDER [--only PART ...]

Each part runs in a process of its own within its limit of seconds; its figures go into FOLDER/gpu.json as soon as it
ends, beside those that an earlier call left there. A part that fails or takes too long leaves the others their turn,
and nothing that it started goes on. Without a GPU each part runs at toy size, or says that it needs one.
"""

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple, NoReturn

import matplotlib as mpl
import torch
from gpu_parts.family import MARK, end_marked, new_mark, run_within
from matplotlib import pyplot
from rich import box
from rich.console import Console
from rich.table import Table

from iccld.durable import write_whole

mpl.use("Agg")
TOOLS = Path(__file__).resolve().parent
sys.path += [str(TOOLS / "benchmarks"), str(TOOLS / "scripts")]  # the parts import from both


class Part(NamedTuple):
    """`module` and `function` in `gpu_parts`; `limit_s` on a GPU. `alone`: it measures, and nothing may run beside."""

    module: str
    function: str
    limit_s: int
    alone: bool = True


PARTS = {
    "compile1": Part("speed", "compile1", 180, alone=False),
    "compile2": Part("speed", "compile2", 180, alone=False),
    "compile_denoiser": Part("speed", "compile_denoiser", 180, alone=False),
    "tests": Part("suite", "suite", 150, alone=False),
    "correctness": Part("correctness", "correctness", 200, alone=False),
    "limits": Part("machine", "limits", 40),
    "stage1_blocks": Part("speed", "stage1_blocks", 90),
    "stage2_blocks": Part("speed", "stage2_blocks", 90),
    "denoiser": Part("speed", "denoiser", 100),
    "stage1": Part("speed", "stage1", 90),
    "stage2": Part("speed", "stage2", 90),
    "attention": Part("speed", "attention", 45),
    "evidence": Part("evidence", "evidence", 300),
}
"""Those that are not `alone` begin together, the others follow in turn, the missing figures first. What is compiled
has a part of its own, since compilation cannot be stopped within a process, and eager figures must not wait for it."""
ON_A_CPU = 4  # times the limit, for a few cores
WITHIN = ("tests", "evidence")  # which end in time by themselves
START_S = 20  # until a part's process has begun its work
LEAST_S = 30  # a part is not begun for less
KEPT_BACK_S = 15  # of the time of all parts: for processes that are slow to end, the chart and the summary
STAGES = ("stage1_blocks", "stage2_blocks", "stage1", "stage2")  # VARIANTS chooses among their figures
OVER = ("failed", "skipped")  # figures that say why there are no others
NO_TIME = {"failed": "no time was left for it"}
STOPPED = Event()  # the programme ends: no part begins, and one that was killed has not failed


def main() -> int:
    """Run the chosen parts and print the summary; the status is 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit-s", type=int, default=3600, help="of a part, where its own is longer")
    parser.add_argument("--end", type=float, default=math.inf, help="time by which all ends, in seconds since 1970")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in the part's own process
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if chosen.part:
        return run_here(chosen.part, chosen.folder, chosen.limit_s)
    os.environ[MARK] = new_mark()
    signal.signal(signal.SIGTERM, end_with_all)
    total_s = chosen.end - time.time() - KEPT_BACK_S
    figures, failed = run_all(chosen.only, chosen.folder, limit_s=chosen.limit_s, total_s=total_s)
    draw(figures, chosen.folder / "gpu.png")
    Console(width=120).print(summary(figures))
    return int(failed)


def end_with_all(*_: object) -> NoReturn:
    """Handle a signal: end what runs, and this process; figures of parts that had ended are kept."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    STOPPED.set()
    end_marked(os.environ[MARK])
    os._exit(128 + signal.SIGTERM)


def run_all(names: Sequence[str], folder: Path, *, limit_s: float, total_s: float) -> tuple[dict[str, Any], bool]:
    """Run the parts, each at most `limit_s`, all at most `total_s`.

    Return what is then in FOLDER/gpu.json, and whether anything failed in this call.
    """
    path, lock, end = folder / "gpu.json", Lock(), time.monotonic() + total_s
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def run(name: str) -> bool:
        if STOPPED.is_set():
            return True
        print(f"== {name}", flush=True)
        left = int(min(limit_of(name), limit_s, end - time.monotonic()))
        own = run_apart(name, folder, left) if left >= min(limit_s, LEAST_S) else NO_TIME
        with lock:
            if STOPPED.is_set():
                return True
            figures[name] = with_earlier(name, figures.get(name, {}), own)
            figures["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
            write_whole(path, json.dumps(figures, indent=1) + "\n")
        return has_failed(own)

    together = [name for name in names if not PARTS[name].alone]
    with ThreadPoolExecutor(len(together) if torch.cuda.is_available() and together else 1) as pool:
        failed = list(pool.map(run, together))
    failed += [run(name) for name in names if PARTS[name].alone]
    return figures, any(failed)


def with_earlier(name: str, earlier: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Put a call's figures of a part in place of earlier ones.

    Earlier figures stay if the part did not run. In a stage, those of other variants stay too.
    """
    if own == NO_TIME or isinstance(own.get("skipped"), str):
        return {**earlier, **own}
    kept = earlier if name in STAGES else {}
    return {**{key: value for key, value in kept.items() if key not in OVER}, **own}


def has_failed(figures: Mapping[str, Any]) -> bool:
    """Tell whether a part, or anything in it, has a reason under `failed`, or is not `within` its tolerance."""
    inner = (value for value in figures.values() if isinstance(value, Mapping))
    return bool(figures.get("failed")) or figures.get("within") is False or any(map(has_failed, inner))


def limit_of(part: str) -> int:
    """Seconds that a part may take here."""
    return PARTS[part].limit_s * (1 if torch.cuda.is_available() else ON_A_CPU)


def run_here(name: str, folder: Path, limit_s: int) -> int:
    part = PARTS[name]
    module = __import__(f"gpu_parts.{part.module}", fromlist=[part.function])
    function: Callable[..., Mapping[str, Any] | Iterator[tuple[str, Any]]] = getattr(module, part.function)
    options = {"limit_s": limit_s - START_S} if name in WITHIN else {}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="iccld_gpu_") as scratch:
        found = function(Path(scratch), **options)
        for figure, value in found.items() if isinstance(found, Mapping) else found:
            figures[figure] = value
            write_whole(folder / f".{name}.json", json.dumps(figures).encode())  # what a limit leaves
        for kept in (path for path in Path(scratch).iterdir() if path.suffix in (".log", ".json", ".md")):
            (folder / kept.name).write_text(kept.read_text())
    return 0


def run_apart(name: str, folder: Path, limit_s: int) -> dict[str, Any]:
    """The part's figures with its seconds, or under `failed` what went wrong."""
    result, log, started = folder / f".{name}.json", folder / f".{name}.log", time.monotonic()
    command = [sys.executable, __file__, str(folder), "--part", name, "--limit-s", str(limit_s)]
    for path in (result, log):  # of a call that was stopped
        path.unlink(missing_ok=True)
    status = run_within(limit_s, command, log=log, cwd=Path.cwd())
    said = log.read_text(errors="replace")[-1500:]
    failed = {"failed": f"not over within {limit_s} s: {said}" if status is None else said} if status != 0 else {}
    figures = json.loads(result.read_text()) if result.exists() else {}
    for path in (result, log):
        path.unlink(missing_ok=True)
    return {**figures, **failed, "seconds": round(time.monotonic() - started, 1)}


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """The stages' samples a second in each variant, as bars that are labelled with MFU and memory."""
    stages = {
        name: {**dict(_measured(figures.get(f"{name}_blocks", {}))), **dict(_measured(figures.get(name, {})))}
        for name in ("stage1", "stage2")
    }
    chart, axes = pyplot.subplots(len(stages), layout="constrained", figsize=(9, 6))
    for axis, (name, variants) in zip(axes, stages.items(), strict=True):
        bars = axis.barh(list(variants), [own["samples_per_s"] for own in variants.values()])
        words = [f"{100 * (own['mfu'] or 0):.1f} % MFU, {own['peak_gib']:.1f} GiB" for own in variants.values()]
        axis.bar_label(bars, words, padding=3)
        axis.margins(x=0.3)
        axis.set(title=f"{name}, {figures.get('limits', {}).get('device', '')}", xlabel="samples/s")
    chart.savefig(path, dpi=120)
    pyplot.close(chart)


def _measured(variants: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, own) for name, own in variants.items() if isinstance(own, Mapping) and "samples_per_s" in own)


def summary(figures: Mapping[str, Any]) -> Table:
    """A line for each figure that is judged."""
    table = Table("part", "figure", "value", box=box.SIMPLE_HEAD, title=figures.get("limits", {}).get("device"))
    for name in PARTS:
        if name in figures:
            for figure, value in rows(figures[name]):
                table.add_row(name, figure, value)
    return table


def rows(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Numbers and short texts, by their dotted names."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from rows(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}", f"{value:.4g}"
        elif isinstance(value, bool | int | str) and value != "":
            yield f"{prefix}{key}", str(value)[:100]
        elif isinstance(value, list) and value:
            yield f"{prefix}{key}", ", ".join(map(str, value))[:100]


if __name__ == "__main__":
    sys.exit(main())
