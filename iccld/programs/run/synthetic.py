"""Batches without data, in the shapes of the experiment's batches: a step's cost depends on shapes alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from iccld.batch_layout import BatchLayout
from iccld.config import Config
from iccld.programs.run.building import noise_of
from iccld.runtime.measure.flops import StepFlops, count_step
from iccld.stages.base import Stage

BLOCK = 16  # pixels; one class each, so that there is something to paste


def synthetic_batch(
    config: Config, numbers: Sequence[int], *, noise: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """Make a micro-batch of these samples as the stream gives it: images of noise, labels in blocks.

    `noise`: as `TrainingStream` takes it; without it, a stage draws its own.
    """
    height, width = config.data.crop_size
    num_classes = config.data.class_set.build().num_classes
    batch: dict[str, Any] = {}
    for domain in ("source", "target"):
        generator = torch.Generator().manual_seed(len(domain) + numbers[0])
        size = (len(numbers), -(-height // BLOCK), -(-width // BLOCK))
        blocks = torch.randint(num_classes, size, generator=generator, dtype=torch.uint8)
        labels = blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :height, :width].contiguous()
        shape = (len(numbers), height, width, 3)
        batch[domain] = {
            "images": torch.randint(256, shape, generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2),
            "labels": labels,
            "valid": torch.ones(len(numbers), height, 1, dtype=torch.bool),
            "keys": [str(number) for number in numbers],
            "numbers": torch.tensor(list(numbers), dtype=torch.int64),
        }
    for purpose, shape in (noise or {}).items():
        generator = torch.Generator().manual_seed(numbers[0])
        batch["source"][purpose] = torch.randn(len(numbers), *shape, generator=generator)
    return batch


def synthetic_batches(name: str, config: Config, layout: BatchLayout, start_step: int) -> Iterator[dict[str, Any]]:
    """Yield this rank's micro-batches for a stage, without end; they are made once, and their numbers go on."""
    made = synthetic_batch(config, range(layout.micro_batch_size), noise=noise_of(name, config))
    if torch.cuda.is_available():
        for domain in made.values():
            domain |= {name: value.pin_memory() for name, value in domain.items() if isinstance(value, torch.Tensor)}
    position = start_step * layout.num_accumulation
    while True:
        numbers = torch.tensor(list(layout.numbers(*divmod(position, layout.num_accumulation))), dtype=torch.int64)
        yield {name: domain | {"numbers": numbers} for name, domain in made.items()}
        position += 1


def flops_per_sample(stage: Stage, config: Config, step: int) -> StepFlops:
    """Count the FLOPs of a sample in that step. Call it before an engine shards the stage."""
    return count_step(stage, synthetic_batch(config, [0]), step)
