"""The loop. It runs any stage over any stream; it knows neither models nor data sets."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from iccld.outcome import AGAIN, Interrupted, plain, status_of, words
from iccld.runtime.checkpoint.manifest import Checkpoint, CheckpointError
from iccld.runtime.checkpoint.store import CheckpointConfig, CheckpointStore
from iccld.runtime.engine.engine import Engine
from iccld.runtime.engine.micro_batch import check_micro_batch_size, num_accumulation
from iccld.runtime.faults.preemption import Preempted, Preemption, say
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure.metrics import MetricsLogger
from iccld.runtime.measure.profiling import OVERLAPPED, PhaseTimer
from iccld.runtime.schedule import ScheduleConfig, learning_rate_factor
from iccld.stages.base import Stage
from iccld.training_step import TrainingStep


@dataclass
class TrainerConfig:
    """One stage's length, batch and cadences. Micro-batch, accumulation and world size only divide the global batch."""

    num_steps: int = 40_000  # optimiser steps of the stage
    global_batch_size: int = 4  # samples of each domain in a step, over all ranks; it belongs to the experiment
    micro_batch_size: int | str = 2
    """Samples that a rank computes at once; `auto`: the largest number that fits in memory."""
    gradient_clip: float = 0.0  # the largest norm of all gradients together; 0 is off
    evaluate_every: int = 0  # score after every so many steps; 0: never while training
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_micro_batch_size(self.micro_batch_size)
        for name in ("num_steps", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must be at least 1.")
        if self.evaluate_every < 0:
            raise ValueError(f"trainer.evaluate_every={self.evaluate_every} must be 0 (never) or above.")
        if self.gradient_clip < 0:
            raise ValueError(f"trainer.gradient_clip={self.gradient_clip} must be 0 (off) or above.")

    @property
    def chosen_micro_batch_size(self) -> int:
        """The number; 1 while it is left to be chosen."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else 1

    def num_accumulation(self, world_size: int) -> int:
        """Micro-batches a rank and step. Raises ValueError where the global batch cannot be divided so."""
        size = self.chosen_micro_batch_size
        return num_accumulation(self.global_batch_size, micro_batch_size=size, world_size=world_size)


class Stream(Protocol):
    @property
    def counters(self) -> Mapping[str, int]: ...

    def batches(self, start_step: int) -> Generator[Mapping[str, Any], None, None]: ...


def attach(stage: Stage, engine: Engine, config: TrainerConfig) -> None:
    """Hand the stage's module to the engine, and its averages where ranks hold shards."""
    engine.attach(
        stage.module,
        stage.param_groups(),
        micro_batch_size=config.chosen_micro_batch_size,
        num_accumulation=config.num_accumulation(engine.world_size),
        gradient_clip=config.gradient_clip,
        replicated=stage.replicated(),
        frozen=stage.frozen(),
    )
    for average, methods in stage.averages().items():
        engine.backend.shard(average, methods=methods)
    stage.start()


@dataclass
class Trainer:
    """Runs a stage from the newest checkpoint, or from step 0, to its last step."""

    stage: Stage
    stream: Stream
    engine: Engine
    checkpoints: CheckpointStore
    metrics: MetricsLogger
    preemption: Preemption
    config: TrainerConfig
    about: Mapping[str, Any]  # goes into every checkpoint's manifest
    evaluate: Callable[[], Mapping[str, float]] | None = None
    after_step: Callable[[int], None] = lambda step: None  # on every rank
    watchdog: Watchdog = field(default_factory=Watchdog)

    def run(self) -> bool:
        """Train to the end; False if a signal ended it early, its position saved."""
        engine, config = self.engine, self.config
        num_accumulation = config.num_accumulation(engine.world_size)
        attach(self.stage, engine, config)
        start_step = self._resume()
        if start_step == config.num_steps:
            return True
        try:
            with contextlib.closing(self.stream.batches(start_step)) as batches:
                finished = self._run_steps(start_step, batches, num_accumulation)
        except (Exception, SystemExit):
            self._finish_save()
            raise
        self.watchdog.phase("save")
        self.checkpoints.wait()
        self.watchdog.phase("finish")
        return finished

    def _finish_save(self) -> None:
        """Wait for the save that runs while an error ends the training, which a failure of the save must not hide."""
        with self.watchdog.aside("save"):  # the other ranks name the phase that failed
            try:
                self.checkpoints.wait()
            except Exception as error:
                if self.engine.is_main:
                    say(words(error))

    def _run_steps(self, start_step: int, batches: Iterator[Mapping[str, Any]], num_accumulation: int) -> bool:
        engine, config = self.engine, self.config
        timer = PhaseTimer(engine.device, self.watchdog.phase)
        train = TrainingStep(self.stage, engine, timer)
        batches = engine.prefetch(batches, copying=lambda: timer.span(OVERLAPPED))
        if self._is_scored(start_step - 1) and engine.any(self.metrics.owes_scores(start_step - 1)):
            self._score(start_step - 1, timer)
        for step in range(start_step, config.num_steps):
            self.watchdog.step(step)
            engine.set_learning_rate(learning_rate_factor(step, num_steps=config.num_steps, config=config.schedule))
            with timer.phase("data"):
                micro_batches, failure = self._fetch(batches, num_accumulation)
            with timer.span("agree"):
                is_end = engine.any(bool(failure) or self.preemption.requested or self.checkpoints.has_failed)
            if is_end:
                self._raise_together(failure)
                self.checkpoints.wait()  # raises if a save failed
                self._stop(step, timer, is_new=step > start_step)
                return False
            losses, metrics = train(micro_batches, step)
            with timer.phase("average"):
                self.after_step(step)
            timer.end_step()
            self.metrics.record(step, losses, metrics)
            is_save = step + 1 == config.num_steps or (step + 1) % config.checkpoint.save_every == 0
            if is_save or self.metrics.is_due(step):
                self._flush(timer)
            if is_save:
                with timer.phase("save"):
                    self._save(step + 1)
            if self._is_scored(step):
                self._score(step, timer)
        return True

    def _is_scored(self, step: int) -> bool:
        every = self.config.evaluate_every
        return bool(self.evaluate and every and (step + 1) % every == 0)

    def _score(self, step: int, timer: PhaseTimer) -> None:
        assert self.evaluate is not None
        with timer.phase("evaluate"), contextlib.suppress(Preempted):  # the next attempt begins with it
            self.metrics.write({"stage": self.stage.name, "step": step, **self.evaluate()})

    def _fetch(self, batches: Iterator[Mapping[str, Any]], count: int) -> tuple[list[Any], Exception | None]:
        """The step's micro-batches on the device, or why this rank has none."""
        try:
            return [next(batches) for _ in range(count)], None
        except (ValueError, OSError) as error:
            return [], plain(error, has_trained=self.watchdog.has_trained)

    def _raise_together(self, failure: Exception | None) -> None:
        """What went wrong on one rank ends all, so that none is left waiting; rank 0 says it for them."""
        failures = {rank: error for rank, error in enumerate(self.engine.gather_objects(failure)) if error}
        if not failures:
            return
        status = max(map(status_of, failures.values()))
        if not self.engine.is_main:
            raise SystemExit(status)
        said = "; ".join(f"rank {rank}: {error}" for rank, error in failures.items())
        raise Interrupted(said) if status == AGAIN else ValueError(said)

    def _stop(self, step: int, timer: PhaseTimer, *, is_new: bool) -> None:
        """Asked to stop before `step`: save, unless this attempt has nothing new."""
        if is_new:
            self._flush(timer)
            with timer.phase("save"):
                self._save(step)
                self.checkpoints.wait()
        self.metrics.event("preempted", step=step)

    def _flush(self, timer: PhaseTimer) -> None:
        self.metrics.flush(
            global_batch_size=self.config.global_batch_size,
            num_steps=self.config.num_steps,
            take_timings=timer.take,
            counters=self.stream.counters,
        )

    def _save(self, step: int) -> None:
        about = dict(self.about, layout=self.engine.layout(), logger_id=self.metrics.logger_id)
        self.checkpoints.save(step, self.engine.runs(self._stage_state()), about)

    def _stage_state(self) -> dict[str, Tensor]:
        return {f"stage/{name}": tensor for name, tensor in self.stage.state_dict().items()}

    def _resume(self) -> int:
        """Load the newest whole checkpoint and return the step to go on with."""
        checkpoint = self.checkpoints.newest()
        manifest = checkpoint.manifest if checkpoint else {}
        if checkpoint:
            self._check_origin(manifest)
            self._load(checkpoint)
        step = checkpoint.step if checkpoint else 0
        config = self.about.get("config", {})
        self.metrics.start(step=step, logger_id=manifest.get("logger_id"), config=config)
        self.metrics.event("started", step=step, layout=self.engine.layout())
        return step

    def _load(self, checkpoint: Checkpoint) -> None:
        start = time.perf_counter()
        self.engine.load(checkpoint.reader, checkpoint.step, self._stage_state())
        seconds = time.perf_counter() - start
        old, new = checkpoint.manifest["layout"], self.engine.layout()
        if (old["engine"], old["world_size"]) != (new["engine"], new["world_size"]):
            self.metrics.event("converted", step=checkpoint.step, layout=old, new_layout=new, seconds=seconds)
            if self.engine.is_main:
                said = [f"{layout['engine']} x {layout['world_size']}" for layout in (old, new)]
                print(f"checkpoint of {said[0]} loaded as {said[1]} in {seconds:.1f} s", flush=True)

    def _check_origin(self, manifest: Mapping[str, Any]) -> None:
        for name in ("stage", "model", "data", "origin"):
            old, new = manifest.get(name), self.about.get(name)
            if old != new:
                raise CheckpointError(
                    f"checkpoint in {self.checkpoints.folder} is of another {name}: it has {_differing(old, new)}, "
                    f"this run {_differing(new, old)}; use another run_dir, or what it was made with."
                )


def _differing(one: Any, other: Any) -> Any:
    """What of one is not the same in the other."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {key: _differing(value, other.get(key)) for key, value in one.items() if value != other.get(key)}
    return one
