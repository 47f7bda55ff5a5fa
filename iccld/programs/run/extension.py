"""A longer training of a run: more steps than its settings had, where it has begun.

What the earlier end has left is set aside, so that nothing that rests on it stays in its place:

    RUN_DIR/before_extension/stage1_step_00040000/      stage1/final, report/results.json, metrics.jsonl (a copy), and
                                                        of the stages after it the folder, pictures and TensorBoard's

Each move is a rename, and the new settings are written after the last one: killed in between, the same command goes on.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from iccld.config import Config, differences, trainer_settings
from iccld.durable import make_folder, refuse_links, refuse_unless_plain, sync, write_whole
from iccld.programs.run.hand_off import final_folder, is_finished
from iccld.programs.run.saved_scores import of_own_models
from iccld.runtime.checkpoint.manifest import STEP_FOLDER
from iccld.runtime.measure.tensorboard import TensorBoardRun
from iccld.settings import TrainerConfig
from iccld.stages.table import STAGES
from iccld.trainer import learning_rate_factor

FOLDER_NAME = "before_extension"


@dataclass(frozen=True)
class Extension:
    """A stage that has begun with `before` steps to do, and is to do `num_steps`."""

    stage: str
    before: int
    num_steps: int

    @property
    def setting(self) -> str:
        """The setting that is larger."""
        return f"{self.stage}.trainer.num_steps"


def extensions(run_dir: Path, saved: Config, config: Config) -> list[Extension]:
    """Find the stages that have begun and are now to do more steps than the saved settings say."""
    steps = {name: [trainer_settings(name, each).num_steps for each in (saved, config)] for name in STAGES}
    return [
        Extension(name, before, after)
        for name, (before, after) in steps.items()
        if after > before and (run_dir / name).exists()
    ]


def remedy_of(found: list[Extension], changed: list[str]) -> str:
    """Return what to do about changed settings: `--extend` where all of them are larger numbers of steps."""
    settings = tuple(each.setting for each in found)
    only_longer = bool(found) and all(change.startswith(settings) for change in changed)
    return "give the same command with --extend to train for longer, or use" if only_longer else "use"


def changes_beside(found: list[Extension], saved: Config, config: Config) -> list[str]:
    """The differences of two settings, without those that the extensions explain."""
    settings = tuple(f"{each.setting}: " for each in found)
    return [change for change in differences(saved, config) if not change.startswith(settings)]


def check_extension(run_dir: Path, found: list[Extension], stages: list[str]) -> None:
    """Refuse a stage that is not among the `stages` to train, or is finished without a checkpoint to go on from.

    Raises ValueError.
    """
    for each in found:
        if each.stage not in stages:
            raise ValueError(
                f"{each.setting}={each.num_steps} asks for more steps than {each.before} of a stage that "
                f"stages=[{','.join(stages)}] does not train; use stage=all, or leave it at {each.before}."
            )
        checkpoints = run_dir / each.stage / "checkpoints"
        if is_finished(run_dir, each.stage) and not any(
            STEP_FOLDER.fullmatch(path.name) for path in checkpoints.glob("*")
        ):
            raise ValueError(
                f"{each.setting}={each.num_steps} cannot be reached from {each.before}: {checkpoints} holds no "
                f"checkpoint to go on from (stage1_from copies none); extend the run that has them, or use another "
                f"run_dir."
            )


def set_aside(run_dir: Path, found: list[Extension], config: Config) -> None:
    """Move what rests on the earlier ends out of the way, and say so. Call on one rank.

    Of the first stage that goes on, its models; of the stages after it, everything; and the scores of all of them.
    """
    first = found[0].stage
    later = [name for name in list(STAGES)[list(STAGES).index(first) + 1 :] if (run_dir / name).exists()]
    aside = run_dir / FOLDER_NAME / f"{first}_step_{found[0].before:08d}"
    final = final_folder(run_dir, first).relative_to(run_dir)
    results = [path.relative_to(run_dir) for path in of_own_models(run_dir)]
    if later:
        _copy_metrics(run_dir, aside)  # those stages begin again at step 0, and their lines are dropped
    beside = [Path(folder) / name for name in later for folder in ("pictures", TensorBoardRun.name)]
    for path in (*beside, *map(Path, later), *results, final):
        _move(run_dir, path, aside)
    for each in found:
        if each.stage not in later:
            print(_said(each, trainer_settings(each.stage, config)), flush=True)
    for name in later:
        again = ", and trained again" if name in config.stages else ""
        print(f"{name} rested on {first} after {found[0].before} steps: it is set aside{again}", flush=True)
    if aside.exists():
        print(f"what the run had is in {aside}", flush=True)


def _copy_metrics(run_dir: Path, aside: Path) -> None:
    """Keep the lines of the earlier end, unless an earlier try has done so. Raises ValueError for links."""
    source, target = run_dir / "metrics.jsonl", aside / "metrics.jsonl"
    refuse_unless_plain(source)
    if source.exists() and not os.path.lexists(target):
        make_folder(aside, within=run_dir)
        write_whole(target, source.read_bytes())


def _move(run_dir: Path, path: Path, aside: Path) -> None:
    """Rename a file or folder of the run, unless an earlier try has done so. Raises ValueError for links."""
    source, target = run_dir / path, aside / path
    if not os.path.lexists(source):
        return
    refuse_links(source, within=run_dir)
    make_folder(target.parent, within=run_dir)
    if os.path.lexists(target):
        raise ValueError(f"{target} exists, and {source} would be set aside there; rename one of them.")
    source.rename(target)
    sync(source.parent)
    sync(target.parent)


def _said(extension: Extension, settings: TrainerConfig) -> str:
    before, after = extension.before, extension.num_steps
    factor = learning_rate_factor(before, num_steps=after, config=settings.schedule)
    ended = learning_rate_factor(before - 1, num_steps=before, config=settings.schedule)
    return (
        f"{extension.stage}: {before} -> {after} steps. From where it stands, its learning rate follows the schedule "
        f"of {after} steps: at step {before} it is {factor:.3g} of the full one, where it had ended at {ended:.3g}. So "
        f"the result is not that of {after} steps from the beginning."
    )
