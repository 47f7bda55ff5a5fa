"""Scores and diagnostics of one model on the validation set, its images divided over the ranks."""

from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from iccld.config import Config
from iccld.data.stream.stream import read_validation, read_validation_pairs
from iccld.diagnostics import Diagnosis, diagnose
from iccld.evaluation import EvaluationResult, Predict, evaluate
from iccld.models.iccld import ICCLD
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.preemption import Preempted
from iccld.stages.predictor import Weights

T = TypeVar("T")
GiveUp = Callable[[], bool]
"""Function that is asked on each rank before each image; if one rank says yes, all raise Preempted."""


def evaluate_predictor(
    predict: Predict, config: Config, engine: Engine, *, give_up: GiveUp = lambda: False
) -> EvaluationResult:
    """Score `predict` on the validation set. Call on every rank."""
    samples = read_validation(config.data, rank=engine.ranks.rank, world_size=engine.ranks.world_size)
    with torch.no_grad(), engine.autocast():
        return evaluate(_until(give_up, samples), predict, **_of_all_ranks(config, engine, give_up))


def diagnose_model(
    model: ICCLD,
    config: Config,
    engine: Engine,
    *,
    student: ICCLD | None = None,
    with_bounds: bool = True,
    give_up: GiveUp = lambda: False,
) -> Diagnosis:
    """Compare latents on `evaluation.diagnostic_images` images: see `iccld.diagnostics`. Call on every rank."""
    most, below = config.evaluation.diagnostic_images, config.evaluation.max_images
    pairs = read_validation_pairs(
        config.data, most=most, below=below, rank=engine.ranks.rank, world_size=engine.ranks.world_size
    )
    options = {"student": student, "seed": config.seed, "with_bounds": with_bounds}
    with engine.autocast():
        return diagnose(_until(give_up, pairs), model, **options, **_of_all_ranks(config, engine, give_up))


def student_beside(folder: Path) -> Path | None:
    """Return the folder of the student that a finished stage left beside its teacher, if there is one."""
    other = folder.with_name(Weights.student.value)
    return other if folder.name == Weights.teacher.value and other.is_dir() else None


def _until(give_up: GiveUp, samples: Iterable[T]) -> Iterable[T]:
    return takewhile(lambda _: not give_up(), samples)


def _of_all_ranks(config: Config, engine: Engine, give_up: GiveUp) -> dict[str, Any]:
    """Build the arguments that scores and diagnostics share: classes, settings, device and the sum over ranks."""

    def all_reduce(counts: Tensor) -> Tensor:
        if engine.ranks.any(give_up()):
            raise Preempted("scoring was given up")
        return engine.ranks.sum(counts)

    return {
        "class_set": config.data.class_set.build(),
        "config": config.evaluation,
        "device": engine.device,
        "all_reduce": all_reduce,
    }
