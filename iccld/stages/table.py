"""Table of the stages, in the order in which a run trains them. Code that depends on the stage asks its line here."""

import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iccld.models.iccld import ICCLD
    from iccld.stages.kind import StageKind

LINES = {
    "stage1": "iccld.stages.segmentation:Segmentation",
    "stage2": "iccld.stages.adversarial:Adversarial",
}


class Table(Mapping[str, "StageKind[Any]"]):
    """Stages by name. A stage's file, which needs torch, is imported when its line is read; its name needs none."""

    def __getitem__(self, name: str) -> "StageKind[Any]":
        return _kind(LINES[name])

    def __iter__(self) -> Iterator[str]:
        return iter(LINES)

    def __len__(self) -> int:
        return len(LINES)


@cache
def _kind(line: str) -> "StageKind[Any]":
    return pkgutil.resolve_name(line)()


STAGES = Table()


def first_stage() -> str:
    """Return the name of the stage that all others build on."""
    return next(iter(STAGES))


def stage_of(model: "ICCLD") -> "StageKind[Any]":
    """Return the stage that a model comes from: the one that its card names, else the first that saves such models."""
    named = model.card.origin.get("stage") if model.card else None
    fitting = [kind for kind in STAGES.values() if kind.saved_as is model.stage]
    return next((kind for kind in fitting if kind.name == named), fitting[0])
