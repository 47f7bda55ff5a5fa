"""A step's time on any number of ranks, and a run's among failures, from a profile. See ASSUMPTIONS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scaling.links import Network, Took, sent_bytes
from scaling.profile import Profile, slowest

MIB = 1 << 20
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB  # DDP's
ZERO_BUCKET = 40_000_000  # runtime/engine/zero.py's, in fp32
NUM_SMALL, SMALL = 2, 8  # messages of a few bytes a step: may we go on, and the losses' denominators
ZERO_SMALL = [("all_reduce", SMALL)] * 3 + [("all_gather", SMALL)] * 2  # flags, norms and undecayed weights, as traced

ASSUMPTIONS = (
    "A rank computes what the profile's slowest rank computes. Phases that work on samples grow with the samples that "
    "a rank has in a step; optimizer and average do not, and are split over the ranks where the engine splits them. "
    "Data keep up at any size; whether memory suffices is not looked at.",
    "Collectives are rings, alpha + bytes x beta a turn (Thakur et al., IJHPCA 2005), inside nodes, then between them, "
    "where every rank has an adapter of the given rate to itself; no two at once, no congestion. NCCL's trees are "
    "faster where alpha rules.",
    "DDP all-reduces buckets of 1, then 25 MiB, each once the backward pass of the last micro-batch has come to it; "
    "gradients come evenly (Li et al., PyTorch Distributed, VLDB 2020). On a CPU the backward pass stands still for "
    "the part of a collective that keeps the core busy.",
    "ZeRO, as the engine sets DeepSpeed up, all-reduces (ZeRO-2: in each micro-batch) and gathers weights after the "
    "update, nothing of it beside computing: 1.5 times DDP's bytes, where the paper (Rajbhandari et al., SC 2020) "
    "has 1; and five small messages of flags, norms and small groups.",
    "FSDP2 gathers weights twice in each micro-batch and reduce-scatters gradients in the last: 1.5 times DDP's bytes, "
    "in units of 25 MiB, on a GPU beside computing, on a CPU alone (Zhao et al., PyTorch FSDP, VLDB 2023). In stage 1 "
    "it gathers the teacher too.",
    "Step times of ranks are log-normal and independent, their spread s that of the profile from step to step; a step "
    "waits for the slowest of N, the median times exp(s z), z the expected largest of N standard normals (Blom 1958).",
    "Failures of nodes are independent and exponential. Saves come at Daly's interval (FGCS 2006; first order: Young "
    "1974), but not before the last is written; the length of a run is by Daly's complete formula. A failure costs the "
    "restart, the time that a save takes to be written in the background, and what was done since the save.",
)


class Burst(NamedTuple):
    """Units of messages `(collective, bytes)`, sent `times` a step while `phase` of a micro-batch computes."""

    phase: str  # empty: while nothing computes
    times: int
    units: Sequence[Sequence[tuple[str, float]]]


def buckets(num_bytes: float, size: float, *, first: float = 0.0) -> list[float]:
    """Divide `num_bytes` into messages: one of `first`, then as many of `size` as there are, and the rest."""
    found = [min(first, num_bytes)] if first else []
    rest = num_bytes - sum(found)
    found += [size] * int(rest // size)
    return [part for part in [*found, rest % size] if part]


def bursts_of(engine: str, profile: Profile, num_accumulation: int) -> list[Burst]:
    """Return the messages that an engine sends in a step; weights and gradients are fp32."""
    size = profile.gradient_bytes
    agree = Burst("", NUM_SMALL, [[("all_reduce", SMALL)]])
    if engine == "ddp":
        units = [[("all_reduce", part)] for part in buckets(size, BUCKET, first=FIRST_BUCKET)]
        return [agree, Burst("backward", 1, units)]
    if engine in ("zero1", "zero2"):
        units = [[("all_reduce", part)] for part in buckets(size, ZERO_BUCKET)]
        times = num_accumulation if engine == "zero2" else 1
        return [agree, Burst("", times, units), Burst("", 1, [[("all_gather", size)], ZERO_SMALL])]
    parts = buckets(size, BUCKET)
    gathers = [[("all_gather", part)] for part in parts]
    both = [[("all_gather", part), ("reduce_scatter", part)] for part in parts]
    forward, backward = ("", "") if profile.device == "cpu" else ("forward", "backward")
    bursts = [agree, Burst(forward, num_accumulation, gathers), Burst(backward, num_accumulation - 1, gathers)]
    teacher = [[("all_gather", profile.teacher_bytes if profile.stage == "stage1" else 0.0)]]
    return [*bursts, Burst(backward, 1, both), *([Burst("", num_accumulation, teacher)] if teacher[0][0][1] else [])]


def exposed(window: float, messages: Sequence[tuple[float, Took]]) -> float:
    """Seconds by which messages lengthen a computation of `window` seconds, each with its share of it before it.

    A message begins when its share has been computed and the one before it is through. Read backwards in time, it is
    what gathers cost that must be through before their share begins.
    """
    now = free = busy = 0.0  # computed up to `now`; the link is free from `free`, and `busy` till then is lost to it
    for share, took in messages:
        work, beside = share * window, max(free - now, 0.0)
        lost = busy / beside if beside else 0.0
        if work < beside - busy:
            now, busy = now + work / (1 - lost), busy - lost * work / (1 - lost)
        else:
            now, busy = now + work + busy, 0.0
        free, busy = max(free, now) + took.seconds, busy + took.busy
    return max(free - window, now - window, 0.0)


def exposed_seconds(bursts: Sequence[Burst], phases: dict[str, float], network: Network, num_ranks: int) -> float:
    """Return the seconds of a step's messages that are not hidden. `phases`: seconds of one micro-batch."""
    total = 0.0
    for phase, times, units in bursts:
        sizes = [sum(size for _, size in unit) for unit in units]
        tooks = [[network.took(*message, num_ranks) for message in unit] for unit in units]
        each = [Took(sum(t.seconds for t in unit), sum(t.busy for t in unit)) for unit in tooks]
        shares = [size / sum(sizes) for size in sizes]
        total += times * exposed(phases.get(phase, 0.0), list(zip(shares, each, strict=True)))
    return total


def accumulation(profile: Profile, num_ranks: int, global_batch_size: int | None) -> int:
    """Micro-batches of a rank and step; the profile's if the batch grows with the ranks. Raises ValueError if none."""
    if global_batch_size is None:
        return profile.num_accumulation
    divisor = profile.micro_batch_size * num_ranks
    if global_batch_size % divisor:
        raise ValueError(
            f"global batch {global_batch_size} is no multiple of micro-batch {profile.micro_batch_size} x {num_ranks} "
            f"GPUs = {divisor}"
        )
    return global_batch_size // divisor


def own_seconds(profile: Profile, engine: str, num_ranks: int, num_accumulation: int) -> dict[str, float]:
    """Return the seconds that a rank computes in a step, by phase."""
    by_sample = ("data", "copy", "prepare", "forward", "backward")
    split = {"ddp": (), "fsdp2": ("optimizer", "average")}.get(engine, ("optimizer",))
    more = num_accumulation / profile.num_accumulation
    return {
        name: seconds * (more if name in by_sample else 1.0) / (num_ranks if name in split else 1)
        for name, seconds in profile.phases.items()
    }


@dataclass(frozen=True)
class Step:
    """A step on `num_ranks`, in seconds: `own_s` computing, then waiting for messages and for the slowest rank."""

    engine: str
    num_ranks: int
    num_nodes: int
    global_batch_size: int
    num_accumulation: int
    own_s: float
    exposed_s: float
    straggler_s: float
    sent_bytes: float  # by a rank

    @property
    def step_s(self) -> float:
        return self.own_s + self.exposed_s + self.straggler_s

    @property
    def samples_per_s(self) -> float:
        return self.global_batch_size / self.step_s


def predict(profile: Profile, engine: str, network: Network, num_ranks: int, global_batch: int | None = None) -> Step:
    """Predict a step. Raises ValueError if the global batch cannot be divided over the ranks."""
    num_accumulation = accumulation(profile, num_ranks, global_batch)
    phases = own_seconds(profile, engine, num_ranks, num_accumulation)
    own_s = sum(phases.values())
    bursts = bursts_of(engine, profile, num_accumulation)
    micro_batch = {name: seconds / num_accumulation for name, seconds in phases.items()}
    sent = [times * sent_bytes(*m, num_ranks) for _, times, units in bursts for unit in units for m in unit]
    return Step(
        engine=engine,
        num_ranks=num_ranks,
        num_nodes=network.num_nodes(num_ranks),
        global_batch_size=num_ranks * profile.micro_batch_size * num_accumulation,
        num_accumulation=num_accumulation,
        own_s=own_s,
        exposed_s=exposed_seconds(bursts, micro_batch, network, num_ranks),
        straggler_s=own_s * math.expm1(profile.spread * slowest(num_ranks)),
        sent_bytes=sum(sent),
    )


@dataclass(frozen=True)
class Failures:
    """`node_mttf_s`: a node's mean time to failure; `restart_s`: from a failure to the next step."""

    node_mttf_s: float
    restart_s: float
    stall_s: float  # of training, by a save
    write_s: float  # of a save, in the background

    def __post_init__(self) -> None:
        times = (self.restart_s, self.stall_s, self.write_s)
        if not (self.node_mttf_s > 0 and all(time >= 0 for time in times)):  # nor what is no number
            raise ValueError("--mttf-node-hours must be above 0, times of saves and restarts at least 0.")

    def interval_s(self, num_nodes: int, step_s: float) -> float:
        """Training between two saves that costs least (Daly 2006), at least a step and a save's writing."""
        mttf, stall = self.node_mttf_s / num_nodes, self.stall_s
        if math.isinf(mttf):
            return math.inf
        root = math.sqrt(stall / (2 * mttf))
        best = math.sqrt(2 * stall * mttf) * (1 + root / 3 + root**2 / 9) - stall if stall < 2 * mttf else mttf
        return max(best, step_s, self.write_s)

    def slowdown(self, num_nodes: int, step_s: float) -> float:
        """Wall time over that of the steps alone (Daly 2006); infinite where a run would not end."""
        mttf, interval = self.node_mttf_s / num_nodes, self.interval_s(num_nodes, step_s)
        if math.isinf(mttf):
            return 1.0
        exponents = (self.restart_s + self.write_s) / mttf, (interval + self.stall_s) / mttf
        if sum(exponents) > 700:  # beyond a float
            return math.inf
        return mttf / interval * math.exp(exponents[0]) * math.expm1(exponents[1])
