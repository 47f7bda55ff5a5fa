"""The loop. It runs any stage over any stream; it knows neither models nor data sets."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from iccld.batch_layout import BatchLayout
from iccld.outcome import AGAIN, Interrupted, plain, say, status_of, words
from iccld.runtime.checkpoint.errors import CheckpointError
from iccld.runtime.checkpoint.manifest import Checkpoint
from iccld.runtime.checkpoint.store import CheckpointStore
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.preemption import Preempted, Preemption
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure.metrics import MetricsLogger, not_finite
from iccld.runtime.measure.profiling import OVERLAPPED, PhaseTimer
from iccld.settings import ScheduleConfig, TrainerConfig
from iccld.stages.base import Stage, StageInputs

Means = dict[str, Tensor]


def learning_rate_factor(step: int, *, num_steps: int, config: ScheduleConfig) -> float:
    """Return the learning rates' factor in 0-based step `step` of `num_steps`, a pure function: nothing is saved."""
    factor = 1.0 - (1.0 - config.final_ratio) * step / num_steps
    if step < config.warmup_steps:
        factor *= 1.0 - (1.0 - step / config.warmup_steps) * (1.0 - config.warmup_ratio)
    return factor


class Stream(Protocol):
    @property
    def counters(self) -> Mapping[str, int]: ...

    def batches(self, start_step: int) -> Generator[Mapping[str, Any], None, None]: ...


class Pictures(Protocol):
    """Pictures of what the stage makes of some images, drawn between steps."""

    def is_due(self, step: int) -> bool:
        """Tell whether a picture is due after `step` steps."""
        ...

    def is_owed(self, step: int) -> bool:
        """Tell whether the picture after `step` steps is missing, as this rank sees it."""
        ...

    def draw(self, step: int) -> None:
        """Draw the picture. Call on every rank; a failure ends no run."""
        ...


def attach(stage: Stage, engine: Engine, layout: BatchLayout, *, gradient_clip: float = 0.0) -> None:
    """Hand the stage's module and its averages to the engine, and begin the averages."""
    engine.attach(
        stage.module,
        stage.param_groups(),
        layout=layout,
        gradient_clip=gradient_clip,
        replicated=stage.replicated(),
        called_by_prepare=stage.called_by_prepare(),
    )
    for average, methods in stage.averages().items():
        engine.backend.shard(average, methods=methods)
    stage.start()


@dataclass
class TrainingStep:
    """One optimiser step of a stage whose module the engine holds; `timer` is told of its phases."""

    stage: Stage
    engine: Engine
    timer: PhaseTimer

    def __call__(
        self, micro_batches: Sequence[Mapping[str, Any]], step: int, *, with_norm: bool = False
    ) -> tuple[Means, Means]:
        """Train on the step's micro-batches, on this rank's device; `with_norm` takes the norm of the gradients.

        Returns the means of their losses, and the sums of their metrics; nothing waits for the device.
        """
        timer, stage = self.timer, self.stage
        with timer.phase("prepare"), torch.no_grad(), self.engine.autocast():
            inputs = [stage.prepare(batch, step) for batch in micro_batches]
        with timer.span("agree"):
            inputs = self._share_denominators(inputs)
        losses, metrics = self.accumulate(inputs)
        with timer.phase("optimizer"):
            self.engine.step(with_norm=with_norm)
        with timer.phase("average"):
            stage.after_step(step)
        return losses, metrics

    def accumulate(self, inputs: Sequence[StageInputs], *, is_shared: bool = True) -> tuple[Means, Means]:
        """Run forward and backward of each micro-batch; return the means of the losses and the sums of the metrics.

        `is_shared`: the last backward pass averages the gradients over all ranks, which is a collective.
        """
        losses: Means = {}
        metrics: Means = {}
        for i, micro_batch in enumerate(inputs):
            is_last = i + 1 == len(inputs)
            with self.engine.micro_batch(is_last=is_last and is_shared):
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
        """Give every micro-batch the global batch's mean denominator; never 0, so that an empty batch loses 0."""
        names = inputs[0].denominators
        local = {name: torch.stack([i.denominators[name] for i in inputs]).sum() for name in names}
        ranks = self.engine.ranks
        count = len(inputs) * ranks.world_size
        shared = {name: (total / count).clamp(min=1e-6) for name, total in ranks.sum_values(local).items()}
        return [i._replace(denominators=shared) for i in inputs]


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
    layout: BatchLayout
    about: Mapping[str, Any]  # goes into every checkpoint's manifest
    evaluate: Callable[[int], Mapping[str, float]] | None = None  # with the number of steps done
    pictures: Pictures | None = None
    after_step: Callable[[int], None] = lambda step: None  # on every rank, with the number of steps done
    watchdog: Watchdog = field(default_factory=Watchdog)

    def run(self) -> bool:
        """Train to the end; False if a signal ended it early, its position saved."""
        engine, config = self.engine, self.config
        attach(self.stage, engine, self.layout, gradient_clip=config.gradient_clip)
        start_step = self._resume()
        try:
            with contextlib.closing(self.stream.batches(start_step)) as batches:
                finished = self._run_steps(start_step, batches)
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
                if self.engine.ranks.is_main:
                    say(words(error))

    def _run_steps(self, start_step: int, batches: Iterator[Mapping[str, Any]]) -> bool:
        engine, config, any_rank = self.engine, self.config, self.engine.ranks.any
        timer = PhaseTimer(engine.device, self.watchdog.phase)
        train = TrainingStep(self.stage, engine, timer)
        batches = engine.prefetch(batches, copying=lambda: timer.span(OVERLAPPED))
        is_shown = self._score_and_draw(start_step, timer, only_owed=True)
        for step in range(start_step, config.num_steps):
            self.watchdog.step(step)
            with timer.phase("data"):
                micro_batches, failure = self._fetch(batches)
            with timer.span("agree"):
                is_end = any_rank(bool(failure) or self.preemption.requested or self.checkpoints.has_failed)
            if is_end:
                self._raise_together(failure)
                self.checkpoints.wait()  # raises if a save failed
                self._stop(step, timer, is_new=step > start_step)
                return False
            done = step + 1
            is_save = done == config.num_steps or done % config.checkpoint.save_every == 0
            is_logged = is_save or self.metrics.is_due(done)
            engine.set_learning_rate(learning_rate_factor(step, num_steps=config.num_steps, config=config.schedule))
            losses, metrics = train(micro_batches, step, with_norm=is_logged)
            with timer.phase("average"):
                self.after_step(done)
            timer.end_step()
            self.metrics.record(done, losses, metrics)
            if is_logged:
                self._flush(timer)
            if is_save:
                with timer.phase("save"):
                    self._save(done)
            is_shown = self._score_and_draw(done, timer)
        if not is_shown:
            self.checkpoints.wait()
            self._stop(config.num_steps, timer, is_new=False)
        return is_shown

    def _score_and_draw(self, step: int, timer: PhaseTimer, *, only_owed: bool = False) -> bool:
        """Score and draw what is due after `step` steps; `only_owed`: what an earlier attempt left undone.

        Returns False if a signal has left some of it to the next attempt.
        """
        any_rank = self.engine.ranks.any
        is_scored = self._is_scored(step) and (not only_owed or any_rank(self.metrics.owes_scores(step)))
        if is_scored and not self._score(step, timer):
            return False
        pictures = self.pictures
        if pictures and pictures.is_due(step) and (not only_owed or any_rank(pictures.is_owed(step))):
            if any_rank(self.preemption.came):
                return False
            with timer.phase("evaluate"):
                pictures.draw(step)
        return True

    def _is_scored(self, step: int) -> bool:
        every = self.config.evaluate_every
        return bool(self.evaluate and every and step and step % every == 0)

    def _score(self, step: int, timer: PhaseTimer) -> bool:
        """Score after `step` steps; False if a signal has ended it, and the next attempt begins with it."""
        assert self.evaluate is not None
        self._refuse_unless_finite(step)  # the best teacher is kept by its score
        try:
            with timer.phase("evaluate"):
                self.metrics.write({"stage": self.stage.name, "step": step, **self.evaluate(step)})
        except Preempted:
            return False
        return True

    def _fetch(self, batches: Iterator[Mapping[str, Any]]) -> tuple[list[Any], Exception | None]:
        """Return the step's micro-batches on the device, or the reason why this rank has none."""
        try:
            if self.stage.view_cache is not None:
                self.stage.view_cache.raise_failures()
            return [next(batches) for _ in range(self.layout.num_accumulation)], None
        except (ValueError, OSError) as error:
            return [], plain(error, has_trained=self.watchdog.has_trained)

    def _raise_together(self, failure: Exception | None) -> None:
        """End all ranks for a failure of one, so that none is left waiting; rank 0 says it for them."""
        failures = {rank: error for rank, error in enumerate(self.engine.ranks.gather(failure)) if error}
        if not failures:
            return
        status = max(map(status_of, failures.values()))
        if not self.engine.ranks.is_main:
            raise SystemExit(status)
        said = "; ".join(f"rank {rank}: {error}" for rank, error in failures.items())
        raise Interrupted(said) if status == AGAIN else ValueError(said)

    def _stop(self, step: int, timer: PhaseTimer, *, is_new: bool) -> None:
        """Stop before `step`, as asked: save, unless this attempt has nothing new."""
        if is_new:
            unread: OSError | None = None
            try:
                self._flush(timer)  # a loss that is not finite ends it here, and is not saved
            except OSError as error:  # nobody reads the figures: a terminal that ends asks for the stop, too
                unread = error
            with timer.phase("save"):
                self._save(step)
                self.checkpoints.wait()
            if unread:
                raise unread
        self.metrics.event("preempted", step=step)

    def _flush(self, timer: PhaseTimer) -> None:
        self.metrics.flush(
            num_steps=self.config.num_steps,
            take_timings=timer.take,
            counters=self.stream.counters,
            facts=self.engine.facts_of_step(),
        )

    def _save(self, step: int) -> None:
        self._refuse_unless_finite(step)
        about = dict(self.about, layout=self.engine.resume_facts(), logger_id=self.metrics.logger_id)
        self.checkpoints.save(step, self.engine.runs(self._stage_state()), about)

    def _refuse_unless_finite(self, step: int) -> None:
        """Raise NonFiniteError if a gradient has made weights NaN or infinite; the next loss would show it."""
        if not self.engine.has_finite_weights():
            raise not_finite(self.stage.name, f"weights are not finite after step {step}, though all losses are")

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
        self.metrics.event("started", step=step, layout=self.engine.resume_facts())
        return step

    def _load(self, checkpoint: Checkpoint) -> None:
        start = time.perf_counter()
        self.engine.load(checkpoint.reader, checkpoint.step, self._stage_state())
        seconds = time.perf_counter() - start
        old, new = checkpoint.manifest["layout"], self.engine.resume_facts()
        if (old["engine"], old["world_size"]) != (new["engine"], new["world_size"]):
            self.metrics.event("converted", step=checkpoint.step, layout=old, new_layout=new, seconds=seconds)
            if self.engine.ranks.is_main:
                said = [f"{facts['engine']} x {facts['world_size']}" for facts in (old, new)]
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
    """Return the part of `one` that is not the same in `other`."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {key: _differing(value, other.get(key)) for key, value in one.items() if value != other.get(key)}
    return one
