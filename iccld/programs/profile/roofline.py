"""Roofline of a step's main parts: arithmetic a byte, and rate, compared with the device's limits.

A part's bytes are those that its operations read and write if each is a pass of its own over memory, as in eager mode;
fused operations move less. Seconds are of the forward passes, those of `prepare` included.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iccld.config import Config, trainer_settings
from iccld.eager import without_compiled_code
from iccld.programs.run.synthetic import synthetic_batch
from iccld.runtime.batches import map_tensors
from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure.flops import FlopCounter, on_meta
from iccld.runtime.measure.peaks import measured_bandwidth, measured_flops, wait_for
from iccld.runtime.measure.profiling import PhaseTimer
from iccld.stages.base import Stage

Work = dict[str, tuple[int, int]]
"""FLOPs and bytes by part."""

ROUNDS = 3


class Traffic(TorchDispatchMode):
    """Counts the bytes of operands and results for the part that the counter reports as running."""

    def __init__(self, counter: FlopCounter) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes[self._counter.running] += sum(t.nbytes for t in (*_tensors(args), *_tensors((out,))))
        return out


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        found += _tensors(value) if isinstance(value, list | tuple) else [value] if isinstance(value, Tensor) else []
    return found


def work_by_part(stage: Stage, config: Config, micro_batch_size: int) -> Work:
    """Count the work of one micro-batch's forward passes. Call it before an engine shards the stage."""
    twin, step = on_meta(stage), trainer_settings(stage.name, config).num_steps - 1
    batch = map_tensors(synthetic_batch(config, range(micro_batch_size)), lambda tensor: tensor.to("meta"))
    with FlopCounter(twin.parts()) as counter, Traffic(counter) as traffic:
        with torch.no_grad():
            inputs = twin.prepare(batch, step)
        twin.module(inputs)
    return {part: (counter.forward[part], traffic.bytes[part]) for part in twin.parts() if counter.forward[part]}


def roofline(stage: Stage, config: Config, work: Work, micro_batch_size: int, engine: Engine) -> dict[str, Any]:
    """Measure each part's FLOPs, bytes and seconds of a micro-batch, and the two limits, all on this rank."""
    precision = engine.accelerator.mixed_precision
    limits = {
        "flops_per_s": measured_flops(engine.device, precision),
        "bytes_per_s": measured_bandwidth(engine.device),
    }
    seconds = _seconds_by_part(stage, config, micro_batch_size, engine)
    parts = {
        part: {"flops": flops, "bytes": size, "seconds": seconds[part], "flops_per_s": flops / seconds[part]}
        for part, (flops, size) in work.items()
        if seconds.get(part)
    }
    return {"limits": limits, "parts": parts}


@without_compiled_code()  # compiled code has no place for hooks
def _seconds_by_part(stage: Stage, config: Config, micro_batch_size: int, engine: Engine) -> dict[str, float]:
    timer, step = PhaseTimer(engine.device), trainer_settings(stage.name, config).num_steps - 1
    running: list[Any] = []
    hooks = [
        hook
        for name, part in stage.parts().items()
        for hook in (
            part.register_forward_pre_hook(partial(_begin, running, lambda name=name: timer.span(name))),
            part.register_forward_hook(partial(_end, running), always_call=True),
        )
    ]
    batch = map_tensors(synthetic_batch(config, range(micro_batch_size)), lambda tensor: tensor.to(engine.device))
    for _ in range(ROUNDS):
        with torch.no_grad(), engine.autocast():
            inputs = stage.prepare(batch, step)
        with engine.micro_batch(is_last=False):  # no backward pass follows
            engine.module(inputs)
        timer.end_step()
    wait_for(engine.device)
    for hook in hooks:
        hook.remove()
    taken = timer.take()
    return {name: statistics.median(step.get(name, 0.0) for step in taken) for name in stage.parts()}


def _begin(running: list[Any], span: Callable[[], Any], *_: Any) -> None:
    running.append(span())
    running[-1].__enter__()


def _end(running: list[Any], *_: Any) -> None:
    running.pop().__exit__(None, None, None)
