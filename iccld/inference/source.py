"""Sources of a model: a model folder, a run directory, or the hub."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from iccld.models.best_model import best_of
from iccld.models.model_card import CARD_NAME, MAX_BYTES, WEIGHTS_NAME
from iccld.stages.table import STAGES

Model = TypeVar("Model")
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
MODEL_FILES = (CARD_NAME, WEIGHTS_NAME)
MAX_WEIGHTS = 64 << 30
"""The most bytes of weights that are fetched: more than any model of this kind has."""


def load_model(
    source: str | Path, load: Callable[[Path], Model], *, weights: str = "teacher", revision: str | None = None
) -> Model:
    """Load the model that `find_model` finds; once more where a training has replaced its best teacher meanwhile."""
    folder = find_model(source, weights=weights, revision=revision)
    try:
        return load(folder)
    except (ValueError, OSError):
        if weights != "best" or (newer := find_model(source, weights=weights)) == folder:
            raise
        return load(newer)


def find_model(
    source: str | Path, *, weights: str = "teacher", revision: str | None = None, stages: Sequence[str] = ()
) -> Path:
    """The folder of a model: `source` itself, the last finished stage's of a run directory, or a copy of the hub's.

    source: a folder, or `owner/name` on the hub where there is no such folder. weights: `teacher`, `student` or `best`
    (the teacher that scored best in training), of a run. revision: a branch, tag or commit of the hub. stages: a run's,
    the last one first; else all of the table.
    Raises ValueError.
    """
    if weights not in ("teacher", "student", "best"):
        raise ValueError(f"weights={weights!r} must be teacher, student or best.")
    folder, is_id = Path(source), isinstance(source, str) and HUB_ID.fullmatch(source) and not source.startswith(".")
    is_of_hub = is_id and not folder.exists()
    if weights != "teacher" and (is_of_hub or (folder / CARD_NAME).is_file()):
        what = "no folder here, so a model of the hub" if is_of_hub else "a model folder"
        raise ValueError(f"weights={weights} is of a run, and {source} is {what}; give the run, or leave it out.")
    if is_of_hub:
        return _from_hub(str(source), revision)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of a model on the hub, and {source} is a folder; leave it out.")
    if weights == "best":
        return _best_of(folder, stages)
    finals = [folder / name / "final" / weights for name in stages or reversed([*STAGES])]
    found = next((place for place in (folder, *finals) if (place / CARD_NAME).is_file()), None)
    if found is None:
        raise ValueError(
            f"{folder} is neither a model folder ({CARD_NAME}, {WEIGHTS_NAME}) nor a run directory with a finished "
            f"stage; give one, or let the same train command finish."
        )
    return found


def _best_of(run_dir: Path, stages: Sequence[str]) -> Path:
    """The best teacher of the last stage that there is, which has to have one."""
    there = {path.parent.name for part in ("final", "best") for path in run_dir.glob(f"*/{part}")}
    names = [name for name in stages or reversed([*STAGES]) if name in there]
    best = (best_of(run_dir / name) for name in names[:1] * 2)  # a second look: it may be replaced within the first
    found = next(filter(None, best), None)
    if found is None:
        stage = names[0] if names else "stageN"
        raise ValueError(
            f"{run_dir} holds no best teacher of {stage}, which a training keeps that scores ({stage}.trainer."
            f"evaluate_every); use weights=teacher."
        )
    return found


def _from_hub(name: str, revision: str | None) -> Path:
    """Fetch the card and the weights once their sizes are known; files that are here are not fetched again.

    Nothing runs them.
    """
    try:
        if constants.is_offline_mode():
            return Path(
                snapshot_download(name, revision=revision, allow_patterns=[*MODEL_FILES], local_files_only=True)
            )
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        _check_sizes(name, sizes)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*MODEL_FILES]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is no folder here, and could not be had from the hub {constants.ENDPOINT} ({what}); if a folder "
            f"is meant, check its path from {Path.cwd()}; if a model of the hub, the spelling, the network, and for a "
            f"private one `hf auth login`."
        ) from error
    if folder.name != info.sha:  # what was fetched is not what was looked at
        raise ValueError(f"{name} has changed on the hub meanwhile; give the same command again.")
    return folder


def _check_sizes(name: str, sizes: dict[str, int]) -> None:
    if missing := [file for file in MODEL_FILES if file not in sizes]:
        raise ValueError(f"{name} on the hub has no {' and no '.join(missing)}; it is no model of iccld's.")
    for file, limit in zip(MODEL_FILES, (MAX_BYTES, MAX_WEIGHTS), strict=True):
        if sizes[file] > limit:
            raise ValueError(f"{name} on the hub: {file} has {sizes[file]:,} bytes, and at most {limit:,} are fetched.")
