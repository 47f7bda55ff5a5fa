"""The settings of the engine, of checkpoints, of faults and of what a run writes down. Nothing here needs torch."""

from dataclasses import dataclass, field
from enum import Enum

from iccld.outcome import AGAIN, FORCED, REFUSED
from iccld.ranges import above, at_least, between, check_ranges, off_or_above, share


class Compile(Enum):
    """Choices of what torch.compile gets: nothing, the blocks that a network repeats, or each network as a whole.

    A block is compiled once for all of its repetitions of one shape: `blocks` pays for a network that repeats one
    often. `auto` is `blocks` on CUDA and `none` on a CPU.
    """

    auto = "auto"
    none = "none"
    blocks = "blocks"
    whole = "whole"

    def on(self, device_type: str) -> "Compile":
        """Return the choice for devices of a type ("cuda", "cpu", ...), which is never `auto`."""
        if self is not Compile.auto:
            return self
        return Compile.blocks if device_type == "cuda" else Compile.none


class Precision(Enum):
    """Precision of the forward and backward pass; weights, moments and averages are fp32."""

    fp32 = "no"
    bf16 = "bf16"
    fp16 = "fp16"  # named to be refused with a reason


class MatmulPrecision(Enum):
    """Precision of fp32 matrix products on a GPU: fp32, TF32, or bf16 (torch.set_float32_matmul_precision)."""

    highest = "highest"
    high = "high"
    medium = "medium"


@dataclass
class EngineConfig:
    """Settings of precision, compilation and kernels; accelerate's YAML says how ranks are formed."""

    precision: Precision = Precision.fp32
    compile: Compile = Compile.auto
    deterministic: bool = False  # the same bits in each run, also on a GPU, where it is slower
    matmul_precision: MatmulPrecision = MatmulPrecision.highest
    cudnn_benchmark: bool = True  # try convolution kernels at each new shape; off if deterministic

    def __post_init__(self) -> None:
        if self.precision is Precision.fp16:
            raise ValueError(
                "engine.precision=fp16 is refused: the discriminator's small gradients vanish in it, and loss scaling "
                "skips steps, so that the position would no longer be the number of updates; use bf16 or fp32."
            )

    def refuse_other_precision(self, launched: str) -> None:
        """Raise ValueError if the launcher's YAML asks for another precision than the experiment, which decides."""
        if launched not in ("", "no", self.precision.value):
            raise ValueError(
                f"mixed_precision={launched} of the launch (an engine's YAML, or accelerate's own option) must be "
                f"engine.precision={self.precision.name}, which decides; leave mixed_precision out, and set "
                f"engine.precision to what you mean, bf16 or fp32."
            )


@dataclass
class CheckpointConfig:
    """Settings of how often to save, how many whole checkpoints stay, and whether training goes on meanwhile."""

    save_every: int = 1000  # steps between two checkpoints
    keep: int = 2  # how many whole checkpoints stay
    asynchronous: bool = True  # training goes on while files are written

    def __post_init__(self) -> None:
        keep = at_least(2, "one may be damaged")
        check_ranges(self, "trainer.checkpoint", save_every=at_least(1), keep=keep)


@dataclass
class MemoryConfig:
    """Settings of how much memory a rank may take.

    What `share` leaves is for fragmentation, for libraries' memory outside of the allocator, and for loader workers.
    """

    share: float = 0.9  # part of the free memory that a rank may take with `micro_batch_size: auto`
    history: bool = False
    """Keep the stack of every allocation on CUDA for an out-of-memory report; it costs microseconds for each."""

    def __post_init__(self) -> None:
        check_ranges(self, "memory", share=share("0.9 is usual"))


@dataclass
class PreemptionConfig:
    """Settings of what follows a signal that asks for a stop."""

    grace_s: float = 600.0
    """Seconds from the signal until the process exits at once; more than a save takes; 0: no limit."""
    debounce_s: float = 3.0
    """Seconds in which further signals are the same request: schedulers and launchers send it several times."""
    exit_status: int = 0  # the status of a run that was asked to stop and has saved

    def __post_init__(self) -> None:
        check_ranges(self, "preemption", debounce_s=between(0, 60, "3 seconds is usual"))
        if self.grace_s and not self.grace_s > self.debounce_s:
            raise ValueError(
                f"preemption.grace_s={self.grace_s} must be above debounce_s={self.debounce_s}, or 0 for no limit; "
                f"use several times what a save takes."
            )
        taken = (1, REFUSED, AGAIN, FORCED)
        if not 0 <= self.exit_status < 128 or self.exit_status in taken:
            raise ValueError(
                f"preemption.exit_status={self.exit_status} must be 0 to 127 and none of {taken}, which mean "
                f"something else; 85 is usual."
            )


WATCHED_BEATS = 5  # before its limit, a rank begins to read the others' heartbeats


@dataclass
class WatchdogConfig:
    """Settings: seconds without progress after which a rank is ended, by its phase.

    The limits of collectives are longer than those of the phases, so that the watchdog speaks first.
    """

    enabled: bool = True  # false: nothing ends a rank that hangs
    beat_s: float = 5.0  # between two signs of life that a rank writes
    preflight_s: float = 180.0  # limit of the checks before a run
    start_s: float = 1800.0
    """Limit until the first step of a stage is done (weights are fetched, code compiled), and after its last."""
    step_s: float = 600.0  # limit of every phase of later steps
    save_s: float = 1800.0  # limit of a save
    evaluate_s: float = 1800.0  # limit of scoring one image
    collective_s: float = 3600.0  # limit of a collective outside of the later steps
    collective_step_s: float = 900.0  # limit of a collective in a later step

    def __post_init__(self) -> None:
        seconds = [name for name in vars(self) if name.endswith("_s")]
        check_ranges(self, "watchdog", **dict.fromkeys(seconds, above(0, "enabled=false switches it off")))
        longest = max(self.start_s, self.save_s, self.evaluate_s)
        for name, limit in (("collective_step_s", self.step_s), ("collective_s", max(longest, self.step_s))):
            if getattr(self, name) <= limit:
                raise ValueError(
                    f"watchdog.{name}={getattr(self, name)} must be above {limit}, the limit of what it is for, so "
                    f"that the watchdog, which can name the rank, is first; use {1.5 * limit:g}."
                )
        least = (WATCHED_BEATS + 1) * self.beat_s
        if min(self.step_s, self.start_s, self.save_s, self.evaluate_s) < least:
            raise ValueError(
                f"watchdog.beat_s={self.beat_s} leaves too few beats within the shortest limit; use limits of at "
                f"least {least:g} s, or a shorter beat."
            )

    def limit(self, phase: str, *, is_first: bool) -> float:
        """Return the limit of a phase; `is_first`: the first step of a stage is not done."""
        own = {"preflight": self.preflight_s, "save": self.save_s, "evaluate": self.evaluate_s}
        own |= {"start": self.start_s, "finish": self.start_s}
        return own.get(phase, self.start_s if is_first else self.step_s)


class WandbMode(Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


class Logger(Enum):
    """Receivers of the metrics."""

    jsonl = "jsonl"
    wandb = "wandb"
    tensorboard = "tensorboard"


@dataclass
class PicturesConfig:
    """Pictures of the same few target crops: the image, its pseudo-label, the student's prediction."""

    every: int = 2000  # steps between two pictures; 0: none
    count: int = 4  # crops in a picture

    def __post_init__(self) -> None:
        check_ranges(self, "metrics.pictures", every=off_or_above(), count=at_least(1))


@dataclass
class MetricsConfig:
    """`log_every`: in steps; losses stay on the device in between. `peak_tflops`: what a device could do, for MFU."""

    log_every: int = 50  # steps between two lines of metrics.jsonl
    peak_tflops: float = 0.0  # 10^12 floating-point operations a second; 0: by the device's name, where it is known
    loggers: list[Logger] = field(default_factory=lambda: [Logger.jsonl, Logger.wandb])
    """Receivers of the metrics: `jsonl` (metrics.jsonl, always), `wandb`, `tensorboard`."""
    wandb: WandbMode = WandbMode.offline  # whether wandb, if it is a logger, sends the metrics; disabled: it gets none
    wandb_project: str = "iccld"  # wandb's project
    pictures: PicturesConfig = field(default_factory=PicturesConfig)

    def __post_init__(self) -> None:
        peak_tflops = at_least(0, "0 takes it from the device's name")
        check_ranges(self, "metrics", log_every=at_least(1), peak_tflops=peak_tflops)
        names = [logger.name for logger in self.loggers]
        if Logger.jsonl not in self.loggers:
            raise ValueError(
                f"metrics.loggers=[{','.join(names)}] must hold jsonl, which resuming, warnings and reports read; use "
                f"[{','.join(['jsonl', *names])}]."
            )

    @property
    def with_wandb(self) -> bool:
        """True if wandb gets the metrics."""
        return Logger.wandb in self.loggers and self.wandb is not WandbMode.disabled
