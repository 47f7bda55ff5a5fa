"""Times of a step's phases on this rank: by the host's clock or, on a GPU, by events that are read once over.

Nothing here waits for the device. What a GPU does is timed where it does it: a phase lasts from when the work before
it is over until its own is, so that `data` is the time for which the device stood idle, not the host.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

PHASES = ("data", "agree", "prepare", "forward", "backward", "sync", "optimizer", "average", "save", "evaluate")
"""Phases in their order. `sync`: from the end of this rank's own backward pass until the gradients of all are there."""

BETWEEN_STEPS = ("save", "evaluate")
"""Phases between steps; the others are parts of a step."""

WAITING = ("agree", "sync")
"""Waiting for other ranks: a rank that waits long is a fast one."""

OVERLAPPED = "copy"
"""Copies from host to device, beside the step's own work."""

Seconds = dict[str, float]


class Clock(Protocol):
    """Marks in time, and the seconds between two that are over."""

    def mark(self) -> Any: ...
    def is_over(self, mark: Any) -> bool: ...
    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """Clock of devices that compute while the host waits."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_over(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Clock of events on the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_over(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000


class _Step(NamedTuple):
    start: Any
    end: Any
    spans: list[tuple[str, Any, Any]]


class PhaseTimer:
    """Times named phases, step by step. `observe` is told of each as it begins, and of `agree` between two."""

    def __init__(self, device: torch.device | None = None, observe: Callable[[str], None] = lambda name: None) -> None:
        self._clock: Clock = CudaClock() if device is not None and device.type == "cuda" else HostClock()
        self._observe = observe
        self._spans: list[tuple[str, Any, Any]] = []
        self._ended: list[_Step] = []
        self._since = self._clock.mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._observe(name)
        with self.span(name):
            yield
        self._observe("agree")  # after an error, it stays in the phase that it came from

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a phase, or a part of one, that is not observed."""
        start = self._clock.mark()
        try:
            yield
        finally:
            self._spans.append((name, start, self._clock.mark()))

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """Time the phases `backward` and `sync` of a backward pass from `loss`.

        What an engine does when the gradients are there, it does in callbacks of autograd that it queues in the midst
        of the pass. One that is queued at the pass's start comes before them, when this rank's own part is over.
        """
        over: list[Any] = []
        queue = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
        handle = loss.register_hook(lambda _: queue(lambda: over.append(self._clock.mark())))
        self._observe("backward")
        start = self._clock.mark()
        try:
            yield
        finally:
            handle.remove()
            end = self._clock.mark()
            own_end = over[0] if over else end
            self._spans += [("backward", start, own_end), ("sync", own_end, end)]
        self._observe("agree")

    def end_step(self) -> None:
        """End a step: it holds what was timed since the last call."""
        end = self._clock.mark()
        self._ended.append(_Step(self._since, end, self._spans))
        self._since, self._spans = end, []

    def take(self) -> list[Seconds]:
        """Return the seconds of each step that is over and not yet taken, by phase, and of the whole under `total`."""
        taken = []
        while self._ended and self._clock.is_over(self._ended[0].end):
            step = self._ended.pop(0)
            seconds: defaultdict[str, float] = defaultdict(float, total=self._clock.seconds(step.start, step.end))
            for name, start, end in step.spans:
                if self._clock.is_over(end):
                    seconds[name] += self._clock.seconds(start, end)
                else:  # it belongs to a copy for a later step
                    (self._ended[0].spans if self._ended else self._spans).append((name, start, end))
            taken.append(dict(seconds))
        return taken


def summed(steps: list[Seconds]) -> Seconds:
    """Sum the seconds of several steps."""
    total: defaultdict[str, float] = defaultdict(float)
    for step in steps:
        for name, seconds in step.items():
            total[name] += seconds
    return dict(total)


class Ranges:
    """Observer of phases that makes each a named range in the trace of `torch.profiler`."""

    def __init__(self) -> None:
        self._range: Any = None

    def begin(self, name: str) -> None:
        self.__exit__()
        self._range = torch.profiler.record_function(f"phase: {name}")
        self._range.__enter__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
