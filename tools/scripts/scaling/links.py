"""Cost of a collective over ranks in nodes: the alpha-beta model of its links, measured and fitted.

A ring over n ranks takes n - 1 turns to scatter a sum or to gather parts, twice that to reduce to all; each turn costs
`alpha + bytes / n * beta` (Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
MPICH", IJHPCA 19(1), 2005). Over nodes it is a ring inside each node on all bytes, and one between the nodes for each
of a node's ranks on its part of them, all at once.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

PASSES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
SIZES = tuple(4 << n for n in range(10, 25, 2))  # 4 KiB to 64 MiB
SMALL, LARGE = 1 << 16, 1 << 20
SECONDS = 1.0  # for each collective and size
FORMAT = 1


class Took(NamedTuple):
    """Seconds of a collective; `busy` of them the rank's own processor is at work on it, and lost to computing."""

    seconds: float
    busy: float


@dataclass(frozen=True)
class Cost:
    """A turn of a ring: seconds a message and a byte; `busy`, from 0 to 1, is the part that computing loses."""

    alpha_s: float
    s_per_byte: float
    busy: float = 0.0


Link = Mapping[str, Cost]
"""Costs by collective."""


def nominal(*, alpha_us: float, gb_per_s: float) -> Link:
    """One cost for all collectives. Raises ValueError for what no link has."""
    if not (alpha_us >= 0 and gb_per_s > 0):  # nor what is no number
        raise ValueError(f"--alpha-us {alpha_us:g} must be at least 0 and --gb-per-s {gb_per_s:g} above 0.")
    return dict.fromkeys(PASSES, Cost(1e-6 * alpha_us, 1e-9 / gb_per_s))


@dataclass(frozen=True)
class Network:
    """Ranks in nodes: `inside` joins those of a node, `between` each with its like in the other nodes."""

    inside: Link
    between: Link
    ranks_per_node: int

    def num_nodes(self, num_ranks: int) -> int:
        return -(-num_ranks // self.ranks_per_node)

    def took(self, collective: str, num_bytes: float, num_ranks: int) -> Took:
        """Measure for a tensor that has so many bytes where it is whole."""
        local = min(num_ranks, self.ranks_per_node)
        seconds = busy = 0.0
        for link, size, part in (
            (self.inside, local, num_bytes),
            (self.between, self.num_nodes(num_ranks), num_bytes / local),
        ):
            cost = link[collective]
            own = PASSES[collective] * (size - 1) * (cost.alpha_s + part / size * cost.s_per_byte)
            seconds, busy = seconds + own, busy + own * cost.busy
        return Took(seconds, busy)


def sent_bytes(collective: str, num_bytes: float, num_ranks: int) -> float:
    """Return the bytes that a rank sends; the hierarchy does not change them."""
    return PASSES[collective] * (num_ranks - 1) / num_ranks * num_bytes


def fit(medians: Mapping[int, float], *, collective: str, num_ranks: int) -> tuple[Cost, float]:
    """Cost of a turn, from seconds by size in bytes, and the largest relative error of the fit.

    A byte costs the median slope between messages of 1 MiB and more (Theil and Sen's estimate), a message the median
    of what is left of those up to 64 KiB: in between, caches and protocols bend the line.
    """
    if len(medians) < 2 or min(medians.values()) <= 0:
        raise ValueError(f"{collective}: a fit needs positive times of at least two sizes, got {dict(medians)}.")
    turns = PASSES[collective] * (num_ranks - 1)
    points = [(size / num_ranks, seconds / turns) for size, seconds in sorted(medians.items())]
    large = [point for point in points if point[0] * num_ranks >= LARGE]
    slopes = [(t - s) / (y - x) for (x, s), (y, t) in combinations(large if len(large) > 1 else points, 2)]
    beta = max(statistics.median(slopes), 0.0)
    small = [s - beta * x for x, s in points if x * num_ranks <= SMALL] or [points[0][1] - beta * points[0][0]]
    alpha = max(statistics.median(small), 0.0)
    return Cost(alpha, beta), max(abs((alpha + beta * x) / s - 1) for x, s in points)


def time_collectives(*, sizes: Sequence[int] = SIZES, seconds: float = SECONDS) -> dict[str, dict[int, list[Took]]]:
    """Measure, on every rank of the default group, the seconds of each collective at each size, several times.

    The first of each is not counted. A size of which one takes longer than `seconds` is the collective's last.
    """
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    found: dict[str, dict[int, list[Took]]] = {collective: {} for collective in PASSES}
    for collective, by_size in found.items():
        for size in sizes:
            run = _runner(collective, size, device)
            run()
            first = torch.tensor(_timed(run).seconds, device=device)
            dist.all_reduce(first, op=dist.ReduceOp.MAX)  # the ranks must agree how often
            count = min(max(int(seconds / float(first)), 3), 200)
            by_size[size] = [_timed(run) for _ in range(count)]
            if float(first) > seconds:
                break
    return found


def _runner(collective: str, size: int, device: torch.device) -> Callable[[], Any]:
    whole = torch.zeros(size // 4, device=device)
    if collective == "all_reduce":
        return lambda: dist.all_reduce(whole)
    part = torch.zeros(len(whole) // dist.get_world_size(), device=device)
    whole = whole[: len(part) * dist.get_world_size()]
    if collective == "all_gather":  # the first names are those of torch from 2.13 on
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather(whole, part)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return lambda: scatter(part, whole)


def _timed(run: Callable[[], Any]) -> Took:
    start, busy = time.perf_counter(), time.process_time()
    run()
    if dist.get_backend() == "nccl":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Took(seconds, time.process_time() - busy)


def summary(found: Mapping[str, Mapping[int, Sequence[Took]]], *, num_ranks: int, on_device: bool) -> dict[str, Any]:
    """Return the content of `link.json`. `on_device`: the device does collectives, so a waiting host loses nothing."""
    collectives = {}
    for collective, by_size in found.items():
        medians = {size: statistics.median(took.seconds for took in times) for size, times in by_size.items()}
        cost, misfit = fit(medians, collective=collective, num_ranks=num_ranks)
        times = by_size[max(by_size)]
        busy = statistics.median(min(took.busy / took.seconds, 1.0) for took in times)
        own = asdict(cost) | {"busy": 0.0 if on_device else busy}
        collectives[collective] = own | {"misfit": misfit, "median_s": {str(size): s for size, s in medians.items()}}
    return {"format": FORMAT, "num_ranks": num_ranks, "collectives": collectives}


def measure_link() -> dict[str, Any]:
    """Measure the fitted costs, as one rank of a launch of several; each rank gets the same kind of figures."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError("--measure-link needs a launch of at least 2 processes, e.g. torchrun --nproc-per-node 2 ...")
    on_device = torch.cuda.is_available()
    if on_device:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("nccl" if on_device else "gloo")
    try:
        return summary(time_collectives(), num_ranks=dist.get_world_size(), on_device=on_device)
    finally:
        dist.destroy_process_group()


def read_link(path: Path) -> Link:
    """Read what `--measure-link` wrote. Raises ValueError for anything else."""
    try:
        collectives = json.loads(path.read_text())["collectives"]
        return {
            name: Cost(*(float(collectives[name][key]) for key in ("alpha_s", "s_per_byte", "busy"))) for name in PASSES
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--link {path} is not what --measure-link writes ({error!r}); measure it anew.") from error
