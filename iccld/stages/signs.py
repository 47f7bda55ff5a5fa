"""Signs of failure that a stage finds in its own logged lines."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

TOO_STRONG = 0.9
"""Accuracy of the discriminator: so sure of nine samples in ten that its loss, and its gradient, is nearly 0."""
BLIND_ABOVE_CHANCE = 0.05
"""Accuracy above chance: over three lines of 50 steps of 4 + 4 images, two standard errors of guessing are 0.02."""
LONGER_WARM_START = "a longer stage1.objective.warm_start_steps"


@dataclass(frozen=True)
class Sign:
    """Sign of failure: `name` identifies it, since it is told once; `words` say what was seen and what to try."""

    name: str
    words: str


class SelfTraining(Protocol):
    """Settings of an objective that learns from pseudo-labels."""

    class_thresholds: float
    class_balance: float


def mean_of(entries: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a metric over the lines that have it, if any."""
    values = [entry[name] for entry in entries if name in entry]
    return statistics.fmean(values) if values else None


def remedies_of_lost_classes(stage: str, objective: SelfTraining) -> list[str]:
    """Return the settings, not yet used, that may keep a class in the pseudo-labels of a stage."""
    thresholds = [] if objective.class_thresholds else [f"{stage}.objective.class_thresholds=0.95"]
    balance = [] if objective.class_balance else [f"{stage}.objective.class_balance=0.5"]
    return [*thresholds, *balance, LONGER_WARM_START]


def signs_of_discriminator(recent: Sequence[Mapping[str, Any]], *, is_ramped: bool) -> list[Sign]:
    """Find a discriminator that teaches nothing: too strong, or still at chance when its weight is whole."""
    domains = [name for name in recent[-1] if name.startswith("accuracy/") and not name.startswith("accuracy/t_bin")]
    if not domains:
        return []
    accuracy, chance = statistics.fmean(mean_of(recent, name) or 0.0 for name in domains), 1 / len(domains)
    finding = f"the discriminator is right about {accuracy:.0%} of the samples (chance is {chance:.0%})"
    if accuracy >= TOO_STRONG:
        words = (
            f"{finding}: it has found a give-away, and teaches the denoiser nothing; try another "
            f"stage2.objective.adversary_input, or a lower stage2.objective.discriminator_learning_rate."
        )
        return [Sign("strong_discriminator", words)]
    if is_ramped and accuracy <= chance + BLIND_ABOVE_CHANCE:
        words = (
            f"{finding}: it sees no difference, and teaches the denoiser nothing; try another "
            f"stage2.objective.adversary_input, a higher stage2.objective.discriminator_learning_rate, or none of it, "
            f"by stage2.objective.adversarial_weight=0."
        )
        return [Sign("blind_discriminator", words)]
    return []
