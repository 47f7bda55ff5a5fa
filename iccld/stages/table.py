"""Table of the stages, in the order in which a run trains them. Code that depends on the stage asks its line here."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iccld.models.iccld import ICCLD
    from iccld.stages.kind import StageKind


def _stage1() -> "StageKind[Any]":
    from iccld.stages.segmentation import Segmentation

    return Segmentation()


def _stage2() -> "StageKind[Any]":
    from iccld.stages.adversarial import Adversarial

    return Adversarial()


LINES: dict[str, Callable[[], "StageKind[Any]"]] = {"stage1": _stage1, "stage2": _stage2}


class Table(Mapping[str, "StageKind[Any]"]):
    """Stages by name. A stage's file, which needs torch, is imported when its line is read; its name needs none."""

    def __getitem__(self, name: str) -> "StageKind[Any]":
        return LINES[name]()

    def __contains__(self, name: object) -> bool:
        return name in LINES

    def __iter__(self) -> Iterator[str]:
        return iter(LINES)

    def __len__(self) -> int:
        return len(LINES)


STAGES = Table()


def first_stage() -> str:
    """Return the name of the stage that all others build on."""
    return next(iter(STAGES))


def stage_of(model: "ICCLD") -> "StageKind[Any]":
    """Return the stage that a model comes from: the one that its card names, else the first that saves such models."""
    named = model.card.origin.get("stage") if model.card else None
    fitting = [kind for kind in STAGES.values() if kind.saved_as is model.stage]
    return next((kind for kind in fitting if kind.name == named), fitting[0])
