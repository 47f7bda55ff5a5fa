"""Diagnostics of a model on the validation set, on all ranks: see `iccld.diagnostics`."""

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

from torch import Tensor

from iccld.config import Config
from iccld.data.stream.stream import read_validation_pairs
from iccld.diagnostics import Diagnosis, diagnose
from iccld.models.iccld import ICCLD
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.preemption import Preempted
from iccld.stages.predictor import Weights


def diagnose_model(
    model: ICCLD,
    config: Config,
    engine: Engine,
    *,
    student: ICCLD | None = None,
    with_bounds: bool = True,
    give_up: Callable[[], bool] = lambda: False,
) -> Diagnosis:
    """Compare latents on `evaluation.diagnostic_images` images, divided over the ranks. Call on every rank.

    `give_up` is asked before each image; where a rank says yes, all raise Preempted.
    """

    def reduce(counts: Tensor) -> Tensor:
        if engine.any(give_up()):
            raise Preempted("the diagnostics were given up")
        return engine.all_reduce_sum(counts)

    most, below = config.evaluation.diagnostic_images, config.evaluation.max_images
    pairs = read_validation_pairs(config.data, most=most, below=below, rank=engine.rank, world_size=engine.world_size)
    with engine.autocast():
        return diagnose(
            takewhile(lambda _: not give_up(), pairs),
            model,
            student=student,
            class_set=config.data.class_set.build(),
            config=config.evaluation,
            seed=config.seed,
            with_bounds=with_bounds,
            device=engine.device,
            all_reduce=reduce,
        )


def student_beside(folder: Path) -> Path | None:
    """The folder of the student that a finished stage left beside its teacher."""
    other = folder.with_name(Weights.student.value)
    return other if folder.name == Weights.teacher.value and other.is_dir() else None
