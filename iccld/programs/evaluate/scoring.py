"""Scores and diagnostics of one model on the validation set, its images divided over the ranks."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from iccld.config import Config
from iccld.data.stream.validation import num_validation_samples, read_validation, read_validation_pairs
from iccld.diagnostics import Diagnosis, diagnose
from iccld.evaluation import EvaluationResult, Predict, evaluate
from iccld.models.iccld import ICCLD
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.preemption import Preempted
from iccld.runtime.ranks import Ranks, together
from iccld.stages.settings import Weights

T = TypeVar("T")
LIFE_S = 10.0  # between two signs of life of a rank that waits for the others
GiveUp = Callable[[int, int], bool]
"""Function that is asked on each rank before each image, with the number of images done and of all, over the ranks; if
one rank says yes, all raise Preempted."""


def never(done: int, total: int) -> bool:
    """Do not give up."""
    return False


def evaluate_predictor(
    predict: Predict, config: Config, engine: Engine, *, give_up: GiveUp = never
) -> EvaluationResult:
    """Score `predict` on the validation set. Call on every rank."""
    ranks, reduction = engine.ranks, Reduction(engine.ranks, give_up)
    with torch.no_grad(), engine.autocast(), reduction.errors_shared():
        samples = read_validation(config.data, rank=ranks.rank, world_size=ranks.world_size)
        reduction.total = _num_scored(config)
        return evaluate(reduction.until_given_up(samples), predict, **_shared_arguments(config, engine, reduction))


def diagnose_model(
    model: ICCLD,
    config: Config,
    engine: Engine,
    *,
    student: ICCLD | None = None,
    with_bounds: bool = True,
    give_up: GiveUp = never,
) -> Diagnosis:
    """Compare latents on `evaluation.diagnostic_images` images: see `iccld.diagnostics`. Call on every rank."""
    most, below, ranks = config.evaluation.diagnostic_images, config.evaluation.max_images, engine.ranks
    reduction = Reduction(ranks, give_up)
    options: dict[str, Any] = {"student": student, "seed": config.seed, "with_bounds": with_bounds}
    options |= _shared_arguments(config, engine, reduction)
    with engine.autocast(), reduction.errors_shared():
        pairs = read_validation_pairs(config.data, most=most, below=below, rank=ranks.rank, world_size=ranks.world_size)
        reduction.total = min(most, _num_scored(config))
        return diagnose(reduction.until_given_up(pairs), model, **options)


def student_beside(folder: Path) -> Path | None:
    """Return the folder of the student that a finished stage left beside its teacher, if there is one."""
    other = folder.with_name(Weights.student.value)
    return other if folder.name == Weights.teacher.value and other.is_dir() else None


def _num_scored(config: Config) -> int:
    total = num_validation_samples(config.data)
    return min(total, config.evaluation.max_images or total)


def _shared_arguments(config: Config, engine: Engine, reduction: "Reduction") -> dict[str, Any]:
    return {
        "class_set": config.data.class_set.build(),
        "config": config.evaluation,
        "device": engine.device,
        "all_reduce": reduction,
    }


@dataclass
class Reduction:
    """The sum of a tensor over the ranks, once each has scored its samples; before it, they tell their errors."""

    ranks: Ranks
    give_up: GiveUp
    total: int = 0  # samples of all ranks
    has_begun: bool = False

    def __call__(self, counts: Tensor) -> Tensor:
        """Return the sum. Raises what one rank met, or Preempted if one has given up."""
        self.has_begun = True
        together(lambda: None, self.ranks)
        if self.ranks.any(self.give_up(self.total, self.total)):
            raise Preempted("scoring was given up")
        return self.ranks.sum(counts)

    def until_given_up(self, samples: Iterable[T]) -> Iterator[T]:
        """Yield this rank's samples until it is to give up."""
        for number, sample in enumerate(samples):
            if self.give_up(min(number * self.ranks.world_size, self.total), self.total):
                return
            yield sample

    @contextmanager
    def errors_shared(self) -> Iterator[None]:
        """Let an error of this rank's samples end all ranks, which it awaits where they sum."""
        try:
            yield
        except (ValueError, OSError) as error:
            if not self.has_begun:
                with self._alive():
                    together(partial(_fail, error), self.ranks)
            raise

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Let the watchdog know that this rank only waits: the others may score for long."""
        is_over = threading.Event()

        def live() -> None:
            while not is_over.wait(LIFE_S):
                self.give_up(self.total, self.total)

        thread = threading.Thread(target=live, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def _fail(error: Exception) -> None:
    raise error
