"""The settings of what has a file of its own here: scoring and the loop. Nothing here needs torch."""

from dataclasses import dataclass, field

from iccld.batch_layout import AUTO, BatchLayout
from iccld.ranges import at_least, between, check_ranges, off_or_above
from iccld.runtime.settings import CheckpointConfig
from iccld.strides import LATENT_STRIDE


@dataclass
class EvaluationConfig:
    """Settings of how images are segmented and scored; lists are [height, width] in pixels."""

    image_size: list[int] = field(default_factory=list)
    """Images are resized to it for the model, and the logits back to the labels' size; empty: they keep their size."""
    sliding_window: bool = False  # segment overlapping windows, not the whole image
    window: list[int] = field(default_factory=lambda: [512, 512])  # height and width of a window
    stride: list[int] = field(default_factory=lambda: [384, 384])  # rows and columns from one window to the next
    num_classes: int = 0
    """The classes that the means run over: 0 for all of the model's; 19, 16 or 13 of the 19 Cityscapes classes."""
    boundary_width: int = 2
    """Width in pixels of the band that the boundary IoU looks at."""
    batch_size: int = 1
    """Images a pass, or windows a pass with `sliding_window`."""
    max_images: int = 0
    """Only samples numbered below this are scored; 0 for all."""
    diagnostic_images: int = 8
    """Images, evenly spread over those that are scored, on which latents are compared (`iccld.diagnostics`); 0: none.
    """

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "evaluation",
            **dict.fromkeys(("boundary_width", "batch_size"), at_least(1)),
            **dict.fromkeys(("num_classes", "max_images", "diagnostic_images"), at_least(0)),
        )
        if self.image_size and (len(self.image_size) != 2 or min(self.image_size) < LATENT_STRIDE):
            raise ValueError(f"evaluation.image_size={self.image_size} must be [height, width] in pixels, or empty.")
        for name in ("window", "stride"):
            sides = getattr(self, name)
            if len(sides) != 2 or min(sides) < LATENT_STRIDE or any(side % LATENT_STRIDE for side in sides):
                rule = f"must be [height, width] in multiples of {LATENT_STRIDE}; use [512, 512]."
                raise ValueError(f"evaluation.{name}={sides} {rule}")
        if any(step > side for step, side in zip(self.stride, self.window, strict=True)):
            raise ValueError(
                f"evaluation.stride={self.stride} must not exceed evaluation.window={self.window}, or pixels between "
                f"windows are never seen; use a stride of at most {self.window}."
            )


@dataclass
class ScheduleConfig:
    """Settings of DAFormer's schedule: linear warm-up from `warmup_ratio`, times a linear decay to `final_ratio`."""

    warmup_steps: int = 1500  # steps until the full learning rate; 0: no warm-up
    warmup_ratio: float = 1e-6  # the share of the learning rate that the warm-up begins with
    final_ratio: float = 0.0  # the share of it that is left after the last step

    def __post_init__(self) -> None:
        ratios = dict.fromkeys(("warmup_ratio", "final_ratio"), between(0, 1))
        check_ranges(self, "trainer.schedule", warmup_steps=off_or_above(), **ratios)


@dataclass
class TrainerConfig:
    """Settings of one stage's length, batch and cadences.

    Micro-batch, accumulation and world size only divide the global batch.
    """

    num_steps: int = 40_000  # optimiser steps of the stage
    global_batch_size: int = 4  # samples of each domain in a step, over all ranks; it belongs to the experiment
    micro_batch_size: int | str = 2
    """Samples that a rank computes at once; `auto`: the largest number that fits in memory."""
    gradient_clip: float = 0.0  # the largest norm of all gradients together; 0 is off
    evaluate_every: int = 0  # score after every so many steps; 0: never while training
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        size = self.micro_batch_size
        if size != AUTO and not (isinstance(size, int) and size >= 1):
            raise ValueError(f"trainer.micro_batch_size={size} must be a number of samples, at least 1, or auto.")
        counts = dict.fromkeys(("num_steps", "global_batch_size"), at_least(1))
        off = dict.fromkeys(("gradient_clip", "evaluate_every"), off_or_above())
        check_ranges(self, "trainer", **counts, **off)

    def layout(self, *, world_size: int = 1, rank: int = 0) -> BatchLayout:
        """Divide the batch among ranks, in micro-batches of 1 while their size is left to be chosen.

        Raises ValueError if the global batch cannot be divided so.
        """
        size = self.micro_batch_size if isinstance(self.micro_batch_size, int) else 1
        return BatchLayout(self.global_batch_size, size, world_size=world_size, rank=rank)
