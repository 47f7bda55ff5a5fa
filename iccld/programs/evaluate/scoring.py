"""Scores and diagnostics of one model on the validation set, its images divided over the ranks."""

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
    samples = read_validation(config.data, rank=engine.ranks.rank, world_size=engine.ranks.world_size)
    total = _num_scored(config)
    reduction = Reduction(engine.ranks, partial(give_up, total, total))
    with torch.no_grad(), engine.autocast(), reduction.errors_shared():
        counted = _until(give_up, samples, total=total, every=engine.ranks.world_size)
        return evaluate(counted, predict, **_shared_arguments(config, engine, reduction))


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
    most, below = config.evaluation.diagnostic_images, config.evaluation.max_images
    pairs = read_validation_pairs(
        config.data, most=most, below=below, rank=engine.ranks.rank, world_size=engine.ranks.world_size
    )
    options: dict[str, Any] = {"student": student, "seed": config.seed, "with_bounds": with_bounds}
    total = min(most, _num_scored(config))
    reduction = Reduction(engine.ranks, partial(give_up, total, total))
    options |= _shared_arguments(config, engine, reduction)
    with engine.autocast(), reduction.errors_shared():
        return diagnose(_until(give_up, pairs, total=total, every=engine.ranks.world_size), model, **options)


def student_beside(folder: Path) -> Path | None:
    """Return the folder of the student that a finished stage left beside its teacher, if there is one."""
    other = folder.with_name(Weights.student.value)
    return other if folder.name == Weights.teacher.value and other.is_dir() else None


def _num_scored(config: Config) -> int:
    total = num_validation_samples(config.data)
    return min(total, config.evaluation.max_images or total)


def _until(give_up: GiveUp, samples: Iterable[T], *, total: int, every: int) -> Iterator[T]:
    """Yield this rank's samples, one in `every`, until it is to give up."""
    for number, sample in enumerate(samples):
        if give_up(min(number * every, total), total):
            return
        yield sample


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
    has_given_up: Callable[[], bool]
    has_begun: bool = False

    def __call__(self, counts: Tensor) -> Tensor:
        """Return the sum. Raises what one rank met, or Preempted if one has given up."""
        self.has_begun = True
        together(lambda: None, self.ranks)
        if self.ranks.any(self.has_given_up()):
            raise Preempted("scoring was given up")
        return self.ranks.sum(counts)

    @contextmanager
    def errors_shared(self) -> Iterator[None]:
        """Let an error of this rank's samples end all ranks, which meet in the sum."""
        try:
            yield
        except (ValueError, OSError) as error:
            if not self.has_begun:
                together(partial(_fail, error), self.ranks)
            raise


def _fail(error: Exception) -> None:
    raise error
