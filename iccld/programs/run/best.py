"""Keeps the teacher that scored best in training: see `iccld.models.best_model`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iccld.config import Config
from iccld.durable import clear_away, holds_only, make_folder, scratch_folder, sync
from iccld.models.best_model import FOLDER_NAME, STEP, best_of, score_of, settings_of
from iccld.models.iccld import ICCLD
from iccld.models.model_card import CARD_NAME, WEIGHTS_NAME
from iccld.models.readme import README_NAME
from iccld.outcome import say
from iccld.programs.run.hand_off import origin_of
from iccld.stages.settings import Weights

OURS = re.compile(STEP.pattern + r"(\.[0-9a-f]{8}|)(\.tmp|)")  # a scratch folder, too
is_ours = holds_only("|".join(map(re.escape, (CARD_NAME, WEIGHTS_NAME, README_NAME))))


def keep_best(teacher: ICCLD, config: Config, *, stage: str, step: int, score: Mapping[str, Any]) -> None:
    """Keep the teacher if no earlier one scored as high, and remove whatever is not the best. Call on one rank.

    score: `miou` in per cent, and how it was computed: `settings` is a checksum. What an earlier attempt has kept
    counts, too, if it was scored by the same settings; otherwise it makes way.
    """
    run_dir = Path(config.run_dir)
    folder = run_dir / stage / FOLDER_NAME
    kept, target = best_of(folder.parent), folder / f"step_{step:08d}"
    if kept is None or settings_of(kept) != score.get("settings") or (score_of(kept) or 0.0) < score["miou"]:
        if os.path.lexists(target) and not is_ours(target):
            say(f"{target} is not a model of this run, so the best teacher is not kept; move it away.")
            return
        kept = _save(teacher, config, target, stage=stage, step=step, score=score) or kept
    for other in folder.glob("step_*"):
        if other != kept and OURS.fullmatch(other.name) and is_ours(other):
            clear_away(other)  # what stays is tried again after the next score


def _save(
    teacher: ICCLD, config: Config, target: Path, *, stage: str, step: int, score: Mapping[str, Any]
) -> Path | None:
    """Write the model folder, which appears whole, and return it; None if another in its place cannot be removed."""
    make_folder(target.parent, within=Path(config.run_dir))
    classes = config.data.class_set.build()
    scratch = scratch_folder(target, is_ours=is_ours)
    origin = origin_of(config, stage=stage, weights=Weights.teacher.value, step=step) | {"score": dict(score)}
    teacher.save_pretrained(scratch, class_names=classes.names, palette=classes.palette, origin=origin)
    sync(scratch)
    if os.path.lexists(target) and (why := clear_away(target)):  # of this step; its score is lower or not readable
        say(f"{target} cannot be removed ({why}), so the best teacher is not kept.")
        return None
    scratch.rename(target)
    sync(target.parent)
    return target
