"""The run directories of a grid: `FOLDER/NAME/seed_0`, each an ordinary run of `train` with a note of the grid.

FOLDER/NAME/seed_0/ablation.json      what the grid said of it, and the code of each attempt
FOLDER/NAME/seed_0/train.log          what its process printed
"""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iccld import __version__
from iccld.config import Config, StageName, differences, load_config, read_config
from iccld.durable import make_folder, write_whole
from iccld.programs.ablate.grid import Grid
from iccld.programs.ablate.tasks import Task
from iccld.programs.evaluate.evaluate import unscored_stages
from iccld.programs.evaluate.results import about_of
from iccld.programs.run.hand_off import final_folder, is_finished
from iccld.reading import read_json
from iccld.slurm.snapshot import code_facts

NOTE_NAME, LOG_NAME = "ablation.json", "train.log"
OF_DENOISER = ("model.denoiser.", "model.discriminator.", "model.condition", "model.residual_")
OF_DENOISING = ("num_steps:", "noise_seeds:", "num_averaged:", "blend:")
OF_STAGE = {
    StageName.stage1: ("stage1.",),
    StageName.stage2: ("stage2.", *OF_DENOISER, *OF_DENOISING),
}
"""The settings that change nothing in a run that does not train the stage."""
NOT_OF_SCORES = ("models", "sha256", "batch_size", "diagnostic_images")


@dataclass(frozen=True)
class Ablation:
    """A grid in a folder. `configs`: the settings of each row, without those of a seed; `command`: what was typed."""

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
        """`train` and its settings."""
        row = self.grid.rows[task.name]
        own = [f"seed={task.seed}", f"run_dir={self.run_dir(task)}"]
        if row.after:
            own.append(f"stage1_from={self.run_dir(Task(row.after, task.seed))}")
        if row.initial:
            own.append(f"initial_model={self.initial_model(task)}")
        return ["train", *row.settings, *own]

    def initial_model(self, task: Task) -> Path:
        """The model of the other row from which this one's stage 1 starts."""
        other = Task(self.grid.rows[task.name].initial, task.seed)
        return final_folder(self.run_dir(other), StageName.stage1) / "teacher"

    def process(self, task: Task) -> list[str]:
        """The process that trains it."""
        return [sys.executable, "-m", "iccld", *self._launch(), *self.words(task)]

    def shown(self, task: Task) -> str:
        """The same as a person types it."""
        return shlex.join(["iccld", *self._launch(), *self.words(task)])

    def _launch(self) -> list[str]:
        return ["launch", str(self.num_ranks)] if self.num_ranks > 1 else []


def open_ablation(grid: Grid, folder: Path, *, num_ranks: int, command: str = "iccld ablate") -> Ablation:
    """The grid, once `train` would take the settings of every row. Raises ValueError naming the row."""
    configs: dict[str, Config] = {}
    for name, row in grid.rows.items():
        try:
            configs[name] = load_config(row.settings)
            _check(configs[name], row.after, num_ranks=num_ranks)
        except ValueError as error:
            raise ValueError(f"runs.{name}: {error}") from error
    return Ablation(grid, folder, num_ranks, configs, command)


def _check(config: Config, after: str, *, num_ranks: int) -> None:
    stages = [stage.value for stage in config.stages]
    if not config.data.validation.shards:
        raise ValueError("data.validation.shards is empty, but runs are compared by their scores; set it.")
    if after and StageName.stage2 not in config.stages:
        raise ValueError(f"after={after} takes stage 1, but stages={stages} trains no stage 2; use stages=[stage2].")
    if not after and StageName.stage1 not in config.stages:
        raise ValueError(f"stages={stages} needs a stage 1; name the run that trains it, as in `after: NAME`.")
    for stage in config.stages:
        getattr(config, stage.value).trainer.num_accumulation(num_ranks)


def has_finished(ablation: Ablation, task: Task) -> bool:
    """Tell whether all stages of the run are trained and scored. Raises ValueError where its scores are damaged."""
    config = ablation.config(task)
    run_dir = ablation.run_dir(task)
    return all(is_finished(run_dir, stage) for stage in config.stages) and not unscored_stages(config)


def changes(ablation: Ablation, task: Task) -> list[str]:
    """`setting: old -> new` for what the grid says differently of a run than when it was begun.

    An unfinished run is compared by what it took from others alone: `train` itself compares the rest, and lets it
    change what has not begun.
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
    if has_finished(ablation, task):
        new, saved = ablation.config(task), read_config(run_dir / "config.yaml")
        new = replace(new, stage1_from=saved.stage1_from)  # compared by name above; a folder may have moved
        if row.initial:
            new = replace(new, initial_model=saved.initial_model)
        unused = tuple(key for stage, keys in OF_STAGE.items() if stage not in new.stages for key in keys)
        found += [c for c in (*differences(saved, new), *_changes_of_scores(saved, new)) if not c.startswith(unused)]
    return found


def _changes_of_scores(saved: Config, new: Config) -> list[str]:
    """Settings that a training may change between attempts, but that change its scores."""
    old, now = ({**about_of([], each), "weights": each.inference.weights.value} for each in (saved, new))
    changed = [key for key in {**old, **now} if key not in NOT_OF_SCORES and old.get(key) != now.get(key)]
    return [f"{key}: {old.get(key)} -> {now.get(key)}" for key in changed]


def refuse_changes(ablation: Ablation, task: Task) -> None:
    """Raise ValueError where the grid has changed for a run that is finished, or took its start from another."""
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
