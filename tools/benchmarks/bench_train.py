"""Speed of the training, ours and others' side by side in one run; a ratio above 1 means that ours is faster.

    python tools/benchmarks/bench_train.py                     minutes on two cores; on a GPU at full size, compiled too
    python tools/benchmarks/bench_train.py --json FILE         keeps the figures (results/bench_train_cpu.json)
    python tools/benchmarks/bench_train.py --check [FILE]      names each ratio that fell by 10 % of the kept one
    python tools/benchmarks/bench_train.py --check FILE --against JSON          the same of an earlier --json

1 denoiser   forward and backward pass against diffusers' UNet2DModel of as many parameters
2 steps      stage 2 against a loop with two optimisers, stage 1 against DAFormer's order of work, on equal modules,
             in bf16 where the device computes in it; DAFormer's in fp32, as it is, and once more at equal precision
2 cache      stage 2 that finds its views in the cache of frozen outputs, against itself without one
3 scaling    two ranks over twice one rank at one batch a rank; and over two processes that exchange nothing
3 data       the share of a step that real runs wait for batches from shards (less is better)
4 attention  xformers against SDPA (needs CUDA)
5 device     samples a second, MFU and peak memory of both stages, eager and compiled (needs CUDA)

Each comparison has a process of its own, as a run has, which keeps freed memory, as on a GPU; in it contenders take
turns, and a figure is the median of the rounds' ratios. On a CPU, 1 and 2 have one thread (--threads) and
count the processor's time, 3 has a thread a rank and counts wall time. E and D of stage 2 have random weights.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from training_peers.attention import attention_figures
from training_peers.denoisers import compare_denoisers
from training_peers.guard import GOALS, is_met, regressions, unmeasured
from training_peers.processes import data_wait, in_own_process, weak_scaling
from training_peers.sizes import SIZES, STAGES, Size
from training_peers.steps import bf16_where_fast, compare_cache, compare_steps, measure_stage, timing_share

from iccld.runtime.settings import Precision

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("denoiser", "steps", "cache", "scaling", "data", "attention", "device")
MASK_READING = ("model.latent=mask", "model.latent_channels=4")
Found = Iterator[tuple[str, dict[str, Any]]]


def arguments() -> argparse.Namespace:
    has_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="gpu" if has_cuda else "cpu", help="default here: %(default)s")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--rounds", type=int, help="turns of each contender (default: the size's)")
    add("--batch-size", type=int, help="of each domain (default: the size's)")
    add("--threads", type=int, default=1, help="on a CPU; more than 1 count wall time (default %(default)s)")
    add("--compiled", action=argparse.BooleanOptionalAction, default=has_cuda, help="the denoisers compiled, too")
    add("--json", type=Path, help="all figures")
    kept = ROOT / "results" / f"bench_train_{'gpu' if has_cuda else 'cpu'}.json"
    add("--check", type=Path, nargs="?", const=kept, help=f"against these figures (default {kept.relative_to(ROOT)})")
    add("--against", type=Path, help="with --check: an earlier --json, in place of a run")
    chosen = parser.parse_args()
    for name in ("rounds", "batch_size", "threads"):
        if (number := getattr(chosen, name)) is not None and number < 1:
            parser.error(f"--{name.replace('_', '-')} {number} must be at least 1.")
    if chosen.against and not chosen.check:
        parser.error("--against names what --check compares; give both.")
    return chosen


def measure(chosen: argparse.Namespace) -> Found:
    """The figures one after another; of parts that cannot run here, why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {"rounds": chosen.rounds, "batch_size": chosen.batch_size}
    size = replace(SIZES[chosen.size], **{key: value for key, value in given.items() if value})
    afresh = partial(in_own_process, chosen.threads if device.type == "cpu" else 0)
    if "denoiser" in chosen.parts:
        for kind in ("", "_compiled") if chosen.compiled else ("",):
            found = afresh(compare_denoisers, size, device, compiled=bool(kind))
            yield f"denoiser_over_diffusers{kind}", found
    if "steps" in chosen.parts:
        yield from measure_steps(size, device, afresh)
    if "cache" in chosen.parts:
        yield "stage2_cached_over_not", afresh(compare_cache, size, bf16_where_fast(device))
    if "scaling" in chosen.parts:
        found = weak_scaling("stage2", chosen.size)
        yield "weak_scaling_2", found
        yield "weak_scaling_2_over_independent", found.get("over_independent", found)
    if "data" in chosen.parts:
        yield "data_wait", data_wait(size)
    if "attention" in chosen.parts:
        yield "xformers_over_sdpa", afresh(attention_figures, size, device)
    if "device" in chosen.parts and device.type == "cuda":
        for name in STAGES:
            for kind, found in afresh(measure_stage, name, size, Precision.bf16).items():
                yield f"{name}_{kind}", found


def measure_steps(size: Size, device: torch.device, afresh: Callable[..., dict[str, Any]]) -> Found:
    precision = bf16_where_fast(device)
    yield "stage2_over_two_optimisers", afresh(compare_steps, "stage2", size, precision)
    yield "stage2_over_two_optimisers_mask", afresh(compare_steps, "stage2", size, precision, *MASK_READING)
    stage1 = afresh(compare_steps, "stage1", size, precision, is_fp32=True)
    yield "stage1_over_daformer_order", stage1
    yield "timing_share", afresh(timing_share, stage1["ours_s"], device)
    if precision is not Precision.fp32:
        yield "stage1_over_daformer_order_equal_precision", afresh(compare_steps, "stage1", size, precision)


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    details = {}
    for name, found in measure(chosen):
        details[name] = found
        print(f"{name}: {found.get('skipped') or round(found.get('ratio', 0.0), 5) or 'measured'}", flush=True)
    return {
        **{name: found["ratio"] for name, found in details.items() if "ratio" in found},
        "details": details,
        **about(chosen),
        "command": " ".join(["python", "tools/benchmarks/bench_train.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "accelerate", "diffusers", "transformers")},
    }


def about(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return what two runs must have in common to be compared, and the device."""
    has_cuda = torch.cuda.is_available()
    return {
        "size": chosen.size,
        "device_type": "cuda" if has_cuda else "cpu",
        "device": torch.cuda.get_device_name() if has_cuda else platform.machine(),
        "precision": bf16_where_fast(torch.device("cuda" if has_cuda else "cpu")).name,  # of whole steps
        "threads": torch.get_num_threads() if has_cuda else chosen.threads,
    }


def tables(figures: dict[str, Any]) -> Iterator[Table]:
    title = f"Size {figures['size']}: ratios, and seconds of a pass or step"
    table = Table("", "ratio", "quartiles", "ours", "theirs", "goal", title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (name for name in GOALS if name in figures):
        own, goal = figures["details"][name], GOALS[name].get(figures["device_type"])
        quartiles = f"{own['low']:.2f}-{own['high']:.2f}" if "low" in own else ""
        seconds = [f"{own[key]:.3f}" if key in own else "" for key in ("ours_s", "theirs_s")]
        met = "" if goal is None else f"{goal} {'met' if is_met(name, own['ratio'], goal) else 'missed'}"
        table.add_row(name, f"{own['ratio']:.3g}", quartiles, *seconds, met)
    yield table
    rates = {name: own for name, own in figures["details"].items() if "samples_per_s" in own and "mfu" in own}
    if rates:
        table = Table("", "samples/s", "MFU", "peak GiB", title=figures["device"])
        for name, own in rates.items():
            mfu = "" if own["mfu"] is None else f"{own['mfu']:.1%}"
            table.add_row(name, f"{own['samples_per_s']:.1f}", mfu, f"{own['peak_gib']:.1f}")
        yield table


def check(path: Path, kept: dict[str, Any], figures: dict[str, Any]) -> bool:
    """Say what is worse than what the file keeps; whether anything is."""
    worse = regressions(kept, figures)
    for line in worse:
        print(f"worse: {line}")
    if left := unmeasured(kept, figures):
        print(f"kept, but not measured: {', '.join(left)}")
    print(f"{len(worse)} ratios are worse than in {path}")
    return bool(worse)


def main() -> int:
    chosen = arguments()
    kept = read(chosen.check) if chosen.check else {}
    if chosen.against:
        return int(check(chosen.check, kept, read(chosen.against)))
    if chosen.json and not chosen.json.absolute().parent.is_dir():  # before minutes of work, not after
        raise ValueError(f"--json {chosen.json}: there is no such folder; make it first.")
    if kept:
        regressions(kept, about(chosen))
    figures = run(chosen)
    for table in tables(figures):
        Console().print(table)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(check(chosen.check, kept, figures)) if chosen.check else 0


def read(path: Path) -> dict[str, Any]:
    """Read a file. Raises ValueError if there is no JSON object."""
    figures = json.loads(path.read_text())
    if not isinstance(figures, dict):
        raise ValueError(f"{path} holds no figures of bench_train.py.")
    return figures


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"bench_train: {error}")
