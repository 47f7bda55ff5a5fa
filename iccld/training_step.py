"""One optimiser step of any stage on any engine: what the loop repeats, and the profiler measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure.profiling import PhaseTimer
from iccld.stages.base import Stage, StageInputs

Means = dict[str, Tensor]


@dataclass
class TrainingStep:
    """Of a stage whose module the engine holds; `timer` is told of its phases."""

    stage: Stage
    engine: Engine
    timer: PhaseTimer

    def __call__(self, micro_batches: Sequence[Mapping[str, Any]], step: int) -> tuple[Means, Means]:
        """Train on the step's micro-batches, on this rank's device.

        Returns the means of their losses, and the sums of their metrics; nothing waits for the device.
        """
        timer, stage = self.timer, self.stage
        with timer.phase("prepare"), torch.no_grad(), self.engine.autocast():
            inputs = [stage.prepare(batch, step) for batch in micro_batches]
        with timer.span("agree"):
            inputs = self._share_denominators(inputs)
        losses, metrics = self._accumulate(inputs)
        with timer.phase("optimizer"):
            self.engine.step()
        with timer.phase("average"):
            stage.after_step(step)
        return losses, metrics

    def _accumulate(self, inputs: list[StageInputs]) -> tuple[Means, Means]:
        """Forward and backward, micro-batch by micro-batch."""
        losses: Means = {}
        metrics: Means = {}
        for i, micro_batch in enumerate(inputs):
            is_last = i + 1 == len(inputs)
            with self.engine.micro_batch(is_last=is_last):
                with self.timer.phase("forward"):
                    output = self.engine.module(micro_batch)
                    total = torch.stack(list(output.losses.values())).sum()
                with self.timer.backward(total):
                    self.engine.backward(total)
            for name, loss in output.losses.items():
                losses[name] = losses.get(name, 0) + loss.detach() / len(inputs)
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0) + value
        return losses, metrics

    def _share_denominators(self, inputs: list[StageInputs]) -> list[StageInputs]:
        """Every micro-batch gets the mean denominator of the global batch; never 0, so that an empty batch loses 0."""
        names = inputs[0].denominators
        local = {name: torch.stack([i.denominators[name] for i in inputs]).sum() for name in names}
        count = len(inputs) * self.engine.world_size
        shared = {name: (total / count).clamp(min=1e-6) for name, total in self.engine.sum_values(local).items()}
        return [i._replace(denominators=shared) for i in inputs]
