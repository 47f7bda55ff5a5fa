"""Averages of a training's weights under power-function profiles, and other averages rebuilt from them.

After Karras et al. 2024 (arXiv 2312.02696), section 3 and appendix C. A profile of exponent gamma at time t weighs the
weights of time tau <= t by (gamma + 1) tau^gamma / t^(gamma + 1); its standard deviation relative to t is its `width`
(sigma_rel in the paper). The time t is the number of optimiser steps done: after step `step`, t = step + 1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iccld.uda.settings import average_name, check_width
from iccld.uda.teacher import own_part


class Profile(NamedTuple):
    """Profile of an average at time t = `step`, the number of optimiser steps done."""

    step: int
    width: float


def exponent(width: float) -> float:
    """Return the exponent gamma >= 0 of a relative width: (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2.

    Raises ValueError outside of (0, 0.2886].
    """
    check_width(width, setting=f"width={width}")
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


def decay(step: int, *, gamma: float) -> float:
    """Return beta of the update after optimiser step `step`, (1 - 1/t)^(gamma + 1): 0 after step 0."""
    return (step / (step + 1)) ** (gamma + 1)


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> np.ndarray:
    """Integrate the products of all pairs of profiles: `(len(first), len(second))` float64, in 1/steps.

    The term t_min^(gamma_a + gamma_b + 1) / (t_a^(gamma_a + 1) t_b^(gamma_b + 1)) is written as a power of t_min /
    t_max, over t_max, so that nothing overflows: that power has the exponent of the later profile.
    """
    steps_a, gammas_a = (column[:, None] for column in _columns(first))
    steps_b, gammas_b = (column[None, :] for column in _columns(second))
    latest = np.maximum(steps_a, steps_b)
    power = (np.minimum(steps_a, steps_b) / latest) ** np.where(steps_a < steps_b, gammas_b, gammas_a)
    return (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1) * power / latest


def snapshot_weights(snapshots: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Return the weights `(N,)` float64, of sum 1, that combine snapshots nearest to the wanted profile.

    Nearest is meant in the mean square. The paper does without the constraint on the sum: by it, a weight that never
    moved comes back unchanged, also from few snapshots. A profile that is among the snapshots is that snapshot alone.
    """
    if wanted in snapshots:
        return np.eye(len(snapshots))[list(snapshots).index(wanted)]
    gram = inner_products(snapshots, snapshots)
    # In units of the profiles' norms: early profiles are high and short, and would spoil the condition.
    norms = np.sqrt(np.diag(gram))
    border = (1 / norms)[:, None]
    scale = np.linalg.norm(border)
    system = np.block([[gram / np.outer(norms, norms), border / scale], [border.T / scale, np.zeros((1, 1))]])
    right = np.append(inner_products(snapshots, [wanted])[:, 0] / norms, 1 / scale)
    return np.linalg.solve(system, right)[:-1] / norms


def profile_error(snapshots: Sequence[Profile], weights: np.ndarray, wanted: Profile) -> float:
    """Return the distance of the combined profile from the wanted one, relative to the wanted one's norm."""
    norm = inner_products([wanted], [wanted])[0, 0]
    cross = inner_products(snapshots, [wanted])[:, 0]
    squared = weights @ inner_products(snapshots, snapshots) @ weights - 2 * weights @ cross + norm
    return math.sqrt(max(0.0, squared) / norm)


class PowerAverages:
    """One fp32 average per width of named tensors. DTensors are averaged shard by shard, without communication."""

    def __init__(self, parameters: Mapping[str, Tensor], widths: Sequence[float]) -> None:
        self.gammas = {average_name(width): exponent(width) for width in widths}
        self.averages: dict[str, dict[str, Tensor]] = {
            prefix: {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in parameters.items()}
            for prefix in self.gammas
        }

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Move towards the student after optimiser step `step` (from 0); after step 0 all averages are the student."""
        for prefix, averages in self.averages.items():
            if averages.keys() != parameters.keys():
                raise ValueError(_other_names(averages, parameters))
            held = [own_part(average) for average in averages.values()]
            current = [own_part(parameters[name]).to(torch.float32) for name in averages]
            weight = 1.0 - decay(step, gamma=self.gammas[prefix])
            torch._foreach_lerp_(held, current, weight)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages as `ema_0.050/<name>`, not copies: fp32, sharded as the parameters are."""
        return {f"{prefix}/{name}": t for prefix, of_width in self.averages.items() for name, t in of_width.items()}


def _columns(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([profile.step for profile in profiles], dtype=np.float64)
    return steps, np.array([exponent(profile.width) for profile in profiles])


def _other_names(own: Iterable[str], other: Iterable[str]) -> str:
    lacking, unknown = sorted(set(own) - set(other)), sorted(set(other) - set(own))
    return (
        f"ema_profile: the parameters lack {len(lacking)} averages ({', '.join(lacking[:3])}) and have {len(unknown)} "
        f"unknown ones ({', '.join(unknown[:3])}); a model keeps its parameters while it is averaged."
    )
