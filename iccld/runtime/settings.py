"""The settings of the engine, of checkpoints and of what a run writes down. Nothing here needs torch."""

import os
from dataclasses import dataclass, field
from enum import Enum

from iccld.ranges import at_least, check_ranges, off_or_above, share


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
    """Precision of fp32 matrix products on a GPU: fp32, TF32, or pairs of bf16 (torch.set_float32_matmul_precision)."""

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
        if Precision.fp16 in (self.precision, Precision(os.environ.get("ACCELERATE_MIXED_PRECISION") or "no")):
            raise ValueError(
                "engine.precision=fp16 is refused: the discriminator's small gradients vanish in it, and loss scaling "
                "skips steps, so that the position would no longer be the number of updates; use bf16 or fp32."
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
