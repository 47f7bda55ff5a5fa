"""Table of the stages, in the order in which a run trains them. Code that depends on the stage asks its line here."""

from typing import Any

from iccld.models.iccld import ICCLD
from iccld.stages.adversarial import Adversarial
from iccld.stages.kind import StageKind
from iccld.stages.segmentation import Segmentation

STAGES: dict[str, StageKind[Any]] = {kind.name: kind for kind in (Segmentation(), Adversarial())}


def first_stage() -> str:
    """Return the name of the stage that all others build on."""
    return next(iter(STAGES))


def stage_of(model: ICCLD) -> StageKind[Any]:
    """Return the stage that a model comes from: the one that its card names, else the first that saves such models."""
    named = model.card.origin.get("stage") if model.card else None
    fitting = [kind for kind in STAGES.values() if kind.saved_as is model.stage]
    return next((kind for kind in fitting if kind.name == named), fitting[0])
