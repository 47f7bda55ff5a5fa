"""Run directories of a grid: `FOLDER/NAME/seed_0`, each an ordinary run of `train` with a note of the grid.

FOLDER/NAME/seed_0/ablation.json      what the grid said of it, and the code of each attempt
FOLDER/NAME/seed_0/train.log          what its process printed
"""

import contextlib
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iccld import __version__
from iccld.config import Config, differences, layout_of, load_config, read_config
from iccld.durable import make_folder, write_whole
from iccld.programs.ablate.grid import Grid
from iccld.programs.ablate.tasks import Task
from iccld.programs.evaluate.evaluate import unscored_stages
from iccld.programs.evaluate.results import about_of
from iccld.programs.run.hand_off import final_folder, is_finished
from iccld.reading import read_json
from iccld.slurm.snapshot import code_facts
from iccld.stages.table import STAGES, first_stage

NOTE_NAME, LOG_NAME = "ablation.json", "train.log"
NOT_OF_SCORES = ("models", "sha256", "batch_size", "diagnostic_images")


@dataclass(frozen=True)
class Ablation:
    """Grid in a folder. `configs`: the settings of each row, without those of a seed; `command`: what was typed."""

    grid: Grid
    folder: Path
    num_ranks: int
    configs: Mapping[str, Config]
    command: str = "iccld ablate"

    def run_dir(self, task: Task) -> Path:
        return self.folder / task.name / f"seed_{task.seed}"

    def config(self, task: Task) -> Config:
        return replace(self.configs[task.name], seed=task.seed, run_dir=str(self.run_dir(task)))

    def words(self, task: Task) -> list[str]:
        """Return `train` and its settings."""
        row = self.grid.rows[task.name]
        own = [f"seed={task.seed}", f"run_dir={self.run_dir(task)}"]
        if row.after:
            own.append(f"stage1_from={self.run_dir(Task(row.after, task.seed))}")
        if row.initial:
            own.append(f"initial_model={self.initial_model(task)}")
        return ["train", *row.settings, *own]

    def initial_model(self, task: Task) -> Path:
        """Return the model of the other row from which this one's stage 1 starts."""
        other = Task(self.grid.rows[task.name].initial, task.seed)
        return final_folder(self.run_dir(other), first_stage()) / "teacher"

    def process_words(self, task: Task) -> list[str]:
        """Return the command of the process that trains it."""
        return [sys.executable, "-m", "iccld", *self._launch(), *self.words(task)]

    def shown(self, task: Task) -> str:
        """Return the same command as a person types it."""
        return shlex.join(["iccld", *self._launch(), *self.words(task)])

    def _launch(self) -> list[str]:
        return ["launch", str(self.num_ranks)] if self.num_ranks > 1 else []


def open_ablation(grid: Grid, folder: Path, *, num_ranks: int, command: str = "iccld ablate") -> Ablation:
    """Open the grid once `train` would take every row's settings. Raises ValueError that names the row."""
    configs: dict[str, Config] = {}
    for name, row in grid.rows.items():
        try:
            configs[name] = load_config(row.settings, are_typed=False)
            _check(configs[name], row.after, num_ranks=num_ranks)
        except ValueError as error:
            raise ValueError(f"runs.{name}: {error}") from error
    return Ablation(grid, folder, num_ranks, configs, command)


def _check(config: Config, after: str, *, num_ranks: int) -> None:
    stages, first = config.stages, first_stage()
    if not config.data.validation.shards:
        raise ValueError("data.validation.shards is empty, but runs are compared by their scores; set it.")
    if after and stages == [first]:
        raise ValueError(f"after={after} takes stage 1, but stages={stages} trains no stage 2; use stages=[stage2].")
    if after and first in stages:
        raise ValueError(f"after={after} takes stage 1, which stages={stages} must not train; use stages=[stage2].")
    if not after and first not in stages:
        raise ValueError(f"stages={stages} needs a stage 1; name the run that trains it, as in `after: NAME`.")
    for stage in stages:
        layout_of(stage, config, world_size=num_ranks)


def has_finished(ablation: Ablation, task: Task) -> bool:
    """Tell whether all stages of the run are trained and scored. Raises ValueError if its scores are damaged."""
    config = ablation.config(task)
    run_dir = ablation.run_dir(task)
    return all(is_finished(run_dir, stage) for stage in config.stages) and not unscored_stages(config)


def is_whole(ablation: Ablation, task: Task) -> bool:
    """Tell whether a run is finished and its scores can be read; what is damaged is said where the run would begin."""
    with contextlib.suppress(ValueError, OSError):
        return has_finished(ablation, task)
    return False


def changes(ablation: Ablation, task: Task) -> list[str]:
    """Return `setting: old -> new` where the grid says something else of a run than when it was begun.

    An unfinished run is compared by what it took from others alone: `train` itself compares the rest, and lets the
    settings of stages that have not begun change.
    """
    run_dir, row = ablation.run_dir(task), ablation.grid.rows[task.name]
    if not (run_dir / NOTE_NAME).is_file():
        return []
    note = read_note(run_dir)
    found = [
        f"{key}: {note.get(key)!r} -> {getattr(row, key)!r}"
        for key in ("after", "initial")
        if note.get(key) != getattr(row, key)
    ]
    if is_whole(ablation, task):
        new, saved = ablation.config(task), read_config(run_dir / "config.yaml")
        if row.after:  # compared by name above; a folder may have moved
            new = replace(new, stage1_from=saved.stage1_from)
        if row.initial:
            new = replace(new, initial_model=saved.initial_model)
        others = [kind for kind in STAGES.values() if kind.name not in new.stages]
        unused = tuple(key for kind in others for key in (f"{kind.name}.", *kind.settings_of_it_alone))
        found += [c for c in (*differences(saved, new), *_changes_of_scores(saved, new)) if not c.startswith(unused)]
    return found


def _changes_of_scores(saved: Config, new: Config) -> list[str]:
    """Compare settings that a training may change between attempts, but that change its scores."""
    old, now = ({**about_of([], each), "weights": each.inference.weights.value} for each in (saved, new))
    changed = [key for key in {**old, **now} if key not in NOT_OF_SCORES and old.get(key) != now.get(key)]
    return [f"{key}: {old.get(key)} -> {now.get(key)}" for key in changed]


def refuse_changes(ablation: Ablation, task: Task) -> None:
    """Raise ValueError if the grid has changed for a run that is finished, or took its start from another."""
    if found := changes(ablation, task):
        run_dir = ablation.run_dir(task)
        raise ValueError(
            f"{run_dir} was trained with other settings than the grid has now ({'; '.join(found[:5])}); give the "
            f"changed run another name, or remove {run_dir} to train it again."
        )


def prepare(ablation: Ablation, task: Task) -> None:
    """Write the note of the grid into the run directory, before its process begins."""
    row, run_dir = ablation.grid.rows[task.name], ablation.run_dir(task)
    make_folder(run_dir, within=ablation.folder)
    facts = code_facts(__version__)
    code = {key: facts[key] for key in ("iccld", "code", "commit", "changed")}
    before = read_note(run_dir)["code"] if (run_dir / NOTE_NAME).is_file() else []
    note = {
        "after": row.after,
        "initial": row.initial,
        "settings": list(row.settings),
        "command": ablation.shown(task),
        "code": before if code in before else [*before, code],
    }
    write_whole(run_dir / NOTE_NAME, json.dumps(note, indent=1) + "\n")


def read_note(run_dir: Path) -> dict[str, Any]:
    """Read what `prepare` wrote. Raises ValueError for anything else."""
    path = run_dir / NOTE_NAME
    note = read_json(path)
    if not isinstance(note, dict) or not isinstance(note.get("code"), list):
        raise ValueError(f"{path} is not a note of the grid; remove {run_dir} to train it again.")
    return note
