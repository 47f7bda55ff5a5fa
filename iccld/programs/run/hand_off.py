"""Hand-off between stages: what a finished stage leaves, and what the next one takes of it.

    stage1/final/teacher/  stage1/final/student/      model folders
    stage1/final/hand_off.json                        which weights go on, and how to know them

The folder appears whole, after the stage's last checkpoint: killed in between, a run makes it again from there.
"""

import dataclasses
import json
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from iccld import __version__
from iccld.config import Config
from iccld.durable import (
    file_checksum,
    holds_only,
    is_plain,
    is_real_folder,
    make_folder,
    scratch_folder,
    sync,
    walk,
    write_whole,
)
from iccld.labels import ClassSet
from iccld.models.model_card import CARD_NAME, WEIGHTS_NAME, build
from iccld.models.readme import README_NAME
from iccld.reading import read_json
from iccld.redact import without_secrets
from iccld.stages.base import Stage
from iccld.stages.settings import Weights
from iccld.stages.table import STAGES, first_stage

HAND_OFF_NAME = "hand_off.json"
MODELS_LEFT = (Weights.teacher.value, Weights.student.value)
"""The models that a finished stage leaves."""
_FILES = "|".join(map(re.escape, (CARD_NAME, WEIGHTS_NAME, README_NAME)))
is_ours = holds_only(rf"hand_off\.json|({'|'.join(MODELS_LEFT)})/({_FILES})")
STATISTICS = ("latent_mean", "latent_std", "condition_mean", "condition_std")


@dataclass(frozen=True)
class HandOff:
    """Content of `hand_off.json`. `weights`: the folder that goes on. Statistics are the latent's per channel."""

    weights: str
    step: int
    class_names: list[str]
    latent_mean: list[float]
    latent_std: list[float]
    condition_mean: list[float]
    condition_std: list[float]
    model_sha256: str


def final_folder(run_dir: Path, name: str) -> Path:
    return run_dir / name / "final"


def is_finished(run_dir: Path, name: str) -> bool:
    return final_folder(run_dir, name).is_dir()


def await_final(run_dir: Path, name: str, *, limit_s: float = 120.0) -> None:
    """Wait until this rank sees what rank 0 has left: a node may remember for a while what its file server had not."""
    folder, until = final_folder(run_dir, name), time.monotonic() + limit_s
    while time.monotonic() < until:
        with suppress(OSError):  # the folder above it may be unknown here, too
            if folder in folder.parent.iterdir():  # a listing asks the server
                return
        time.sleep(0.5)


def hand_over(stage: Stage, config: Config, *, step: int) -> None:
    """Write the finished stage's models, and name the one that goes on: the teacher. Call on one rank."""
    folder = final_folder(Path(config.run_dir), stage.name)
    make_folder(folder.parent, within=Path(config.run_dir))
    scratch = scratch_folder(folder, is_ours=is_ours)
    classes = config.data.class_set.build()
    models = stage.assemble_models()
    for weights, model in models.items():
        origin = origin_of(config, stage=stage.name, weights=weights, step=step)
        model.save_pretrained(scratch / weights, class_names=classes.names, palette=classes.palette, origin=origin)
    weights = Weights.teacher.value
    statistics = {name: models[weights].get_buffer(name).tolist() for name in STATISTICS}
    names, checksum = list(classes.names), file_checksum(scratch / weights / WEIGHTS_NAME)
    facts = HandOff(weights=weights, step=step, class_names=names, model_sha256=checksum, **statistics)
    write_whole(scratch / HAND_OFF_NAME, json.dumps(dataclasses.asdict(facts), indent=1))
    for written in (*models, "."):
        sync(scratch / written)
    scratch.rename(folder)
    sync(folder.parent)


def origin_of(config: Config, *, stage: str, weights: str, step: int) -> dict[str, Any]:
    """Return the origin of a run's weights, for their card: run, step, names of the data sets, ids of the classes.

    `label_ids` has, by class, the ids in the shards' labels that count as it, with their names.
    """
    sets = {
        role: [part.name or PurePosixPath(without_secrets(part.shards)).name for part in (data, *data.also.values())]
        for role in ("source", "target")
        if (data := getattr(config.data, role)).shards
    }
    facts = {"run_dir": config.run_dir, "stage": stage, "weights": weights, "version": __version__}
    return facts | {"step": step, "data": sets, "label_ids": _label_ids(config.data.class_set.build())}


def _label_ids(classes: ClassSet) -> dict[str, dict[str, str]]:
    of_class: dict[str, dict[str, str]] = {name: {} for name in classes.names}
    for label_id, index in sorted(classes.of_train_id.items()):
        of_class[classes.names[index]][str(label_id)] = classes.id_names[label_id]
    return of_class


def take_first_stage(config: Config, *, is_main: bool) -> None:
    """Copy the finished stage 1 that `stage1_from` names, unless the run has one; one rank does it.

    It is a copy so that each folder stays whole by itself: one may be moved, exported or removed without the other.
    Raises ValueError if the other run has none, or the files do not fit its `hand_off.json`.
    """
    run_dir, origin = Path(config.run_dir), Path(config.stage1_from)
    first = first_stage()
    if not config.stage1_from or not is_main or is_finished(run_dir, first):
        return
    source, target = final_folder(origin, first), final_folder(run_dir, first)
    if not (source / HAND_OFF_NAME).is_file() or not is_ours(source):
        raise ValueError(f"stage1_from={origin}: {source} holds no finished stage 1; finish that run first.")
    make_folder(target.parent, within=run_dir)
    scratch = scratch_folder(target, is_ours=is_ours)
    _copy(source, scratch)
    try:
        facts = build(HandOff, read_json(scratch / HAND_OFF_NAME), where=str(source / HAND_OFF_NAME))
        checksum = file_checksum(scratch / Weights(facts.weights).value / WEIGHTS_NAME)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"stage1_from={origin}: {source} cannot be read ({error}); train that run again.") from error
    if checksum != facts.model_sha256:
        raise ValueError(f"stage1_from={origin}: {source} is not what stage 1 left (its checksum differs).")
    scratch.rename(target)
    sync(target.parent)


def _copy(source: Path, target: Path) -> None:
    """Copy all files of a folder into an existing one. Raises ValueError for a link."""
    for path in (path for path in walk(source) if not is_real_folder(path)):
        if not is_plain(path):
            raise ValueError(f"{path} is a link, which stage 1 did not leave; train its run again.")
        copy = target / path.relative_to(source)
        make_folder(copy.parent, within=target)
        shutil.copyfile(path, copy)
        sync(copy)
    for folder in {target, *(path for path in walk(target) if path.is_dir())}:
        sync(folder)


def handed_over(name: str, config: Config) -> tuple[Path, HandOff]:
    """Find the model folder that a stage handed over, and check it against the stage's record.

    Raises ValueError if the stage is not finished, the file is no hand-off, the weights are not those that the stage
    left, or the classes are not this run's.
    """
    final, said = final_folder(Path(config.run_dir), name), _said(name)
    if not final.is_dir():
        after = ", ".join(kind.name for kind in STAGES.values() if kind.previous == name)
        other = ", or take another run's by stage1_from=RUN_DIR" if name == first_stage() else ""
        raise ValueError(
            f"stages=[{after}] needs {said}'s model in {final}; run with stage=all, or with stages=[{name}] first"
            f"{other}."
        )
    path = final / HAND_OFF_NAME
    remedy = f"remove {final}, and the same command with stage=all makes it again from {said}'s last checkpoint"
    try:
        facts = build(HandOff, read_json(path), where=str(path))
        if facts.weights not in MODELS_LEFT:  # a path would lead elsewhere
            raise ValueError(f"weights={facts.weights!r} must be one of {[*MODELS_LEFT]}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}.") from error
    classes = list(config.data.class_set.build().names)
    if facts.class_names != classes:
        raise ValueError(
            f"{path}: {said} learnt {len(facts.class_names)} classes, not data.class_set's {len(classes)}."
        )
    folder = final / facts.weights
    if folder.is_symlink() or (folder / WEIGHTS_NAME).is_symlink():
        raise ValueError(f"{folder / WEIGHTS_NAME} is reached by a link, which {said} did not leave; {remedy}.")
    if not (folder / WEIGHTS_NAME).is_file() or file_checksum(folder / WEIGHTS_NAME) != facts.model_sha256:
        raise ValueError(f"{folder / WEIGHTS_NAME} is not what {said} left (its checksum differs); {remedy}.")
    return folder, facts


def _said(name: str) -> str:
    """Spell the name of a stage as messages do: `stage 1`."""
    return f"stage {name.removeprefix('stage')}"
