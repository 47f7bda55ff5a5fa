"""The teacher that scored best in training, as a run keeps it, in a model folder of its own.

    stage1/best/step_00004000/      model.safetensors, README.md, and config.json, whose `origin` holds the score

A new best one appears by a rename before the one before it goes: killed in between, a run has both, and both scores.
"""

import re
from pathlib import Path
from typing import Any

from iccld.models.model_card import CARD_NAME, MAX_BYTES
from iccld.reading import read_json

FOLDER_NAME = "best"
MAX_SCORE = 100.0
STEP = re.compile(r"step_\d{8}")


def best_of(stage_folder: Path) -> Path | None:
    """Find the model folder with the highest score below `RUN_DIR/stageN`, of equal ones the first; None if none."""
    folders = sorted(path for path in (stage_folder / FOLDER_NAME).glob("step_*") if STEP.fullmatch(path.name))
    scored = [(score, folder) for folder in folders if (score := score_of(folder)) is not None]
    return max(scored, key=lambda pair: pair[0], default=(0.0, None))[1]


def score_of(folder: Path) -> float | None:
    """Read the mIoU in per cent of a model that was kept for it; None where the card has none, or cannot be read."""
    miou = _entry(folder, "miou")
    return float(miou) if isinstance(miou, int | float) and abs(miou) <= MAX_SCORE else None


def settings_of(folder: Path) -> str | None:
    """Read the checksum of the settings that the model was scored by; None where the card has none."""
    checksum = _entry(folder, "settings")
    return checksum if isinstance(checksum, str) else None


def _entry(folder: Path, name: str) -> Any:
    try:
        return read_json(folder / CARD_NAME, MAX_BYTES)["origin"]["score"][name]
    except (OSError, ValueError, LookupError, TypeError):
        return None
