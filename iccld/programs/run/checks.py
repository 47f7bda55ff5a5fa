"""Checks before a run begins: that it is alone, that its settings fit, and that the folder is its own."""

import os
import time
from contextlib import suppress
from pathlib import Path

from iccld.config import Config, layout_of, read_config, stage_settings, to_yaml, trainer_settings
from iccld.data.stream.validation import read_validation
from iccld.durable import (
    clear_away,
    holds_only,
    make_folder,
    refuse_links,
    refuse_unless_plain,
    remove_left_overs,
    walk,
    write_whole,
)
from iccld.programs.run.extension import (
    Extension,
    changes_beside,
    check_extension,
    extensions,
    remedy_of,
    set_aside,
)
from iccld.programs.run.hand_off import is_finished
from iccld.programs.run.kept_views import open_view_files
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.ranks import Ranks, naming_lost_ranks, together
from iccld.stages.settings import Weights
from iccld.stages.table import STAGES

LEFT_OVER_AFTER_S = 86_400.0  # the process that wrote them has ended
is_of_beats = holds_only(r"(heartbeats/)?(rank_\d+\.json|refused\.(txt|claim))")


def check_links(run_dir: Path, config: Config) -> None:
    """Refuse links where a training writes, before it has worked for days. Every rank looks, so that all end alike."""
    parts = [
        f"{stage}/{part}"
        for stage in config.stages
        if not is_finished(run_dir, stage)
        for part in ("checkpoints", "final", "ema", "best")
    ]
    for name in ("heartbeats", "logs", "pictures", "profile", "report", "tensorboard", "wandb", *parts):
        refuse_links(run_dir / name, within=run_dir)
    for name in ("lock", "config.yaml", "metrics.jsonl", "events.jsonl"):
        refuse_unless_plain(run_dir / name)


def check_alone(run_dir: Path, holder: str, ranks: Ranks) -> None:
    with naming_lost_ranks():  # rank 0 may have failed to lock the folder
        holder = ranks.from_main(holder)
    if holder:
        raise ValueError(f"run_dir={run_dir} is in use by {holder}; wait for it, end it, or use another run_dir.")


def check_settings(config: Config, engine: Engine) -> None:
    """Refuse settings that a later stage would fail on, before time is spent on an earlier one."""
    for name in config.stages:
        layout_of(name, config, world_size=engine.ranks.world_size)
        STAGES[name].check(stage_settings(name, config), device=engine.device, is_sharded=engine.is_sharded)
        open_view_files(name, config)
    class_set = config.data.class_set.build()
    class_set.subset(config.evaluation.num_classes or class_set.num_classes)
    if config.data.validation.shards:
        read_validation(config.data)
    elif scored := [name for name in config.stages if trainer_settings(name, config).evaluate_every]:
        raise ValueError(
            f"{scored[0]}.trainer.evaluate_every is set, but data.validation.shards is empty; set it, or "
            f"evaluate_every=0."
        )
    for name in config.stages if config.inference.weights is Weights.best else ():
        settings = trainer_settings(name, config)
        if not 0 < settings.evaluate_every <= settings.num_steps:
            raise ValueError(
                f"inference.weights=best scores the teacher that scored best in training, and {name}.trainer."
                f"evaluate_every={settings.evaluate_every} scores none; set it, or weights=teacher."
            )
    if not config.data.target.shards and any(
        STAGES[name].reads_target(stage_settings(name, config)) for name in config.stages
    ):
        raise ValueError(
            "data.target.shards is empty, but adaptation needs target images; set it, or use stage=source_only."
        )


def claim_run_dir(run_dir: Path, config: Config, ranks: Ranks, *, extend: bool = False) -> list[Extension]:
    """Refuse a run directory of another config, else write this one's. A stage that has not begun may differ.

    `extend`: stages that have begun may get more steps; what their earlier end has left is set aside. Returns these.
    """
    path, longer = run_dir / "config.yaml", list[Extension]()
    if path.exists() and any((run_dir / stage).exists() for stage in STAGES):
        saved = read_config(path)
        for name in ("stage1_from", "initial_model"):
            old, new = getattr(saved, name), getattr(config, name)
            if old and new and Path(old).resolve() == Path(new).resolve():  # one place, however it is spelt
                setattr(config, name, old)
        unbegun = tuple(f"{stage}." for stage in STAGES if not (run_dir / stage).exists())
        longer = extensions(run_dir, saved, config)
        allowed = longer if extend else []
        changed = [change for change in changes_beside(allowed, saved, config) if not change.startswith(unbegun)]
        if changed:
            raise ValueError(
                f"run_dir={run_dir} holds a run of another config ({'; '.join(changed[:5])}); "
                f"{remedy_of(longer, changed)} another run_dir, or the settings in {path}."
            )
        check_extension(run_dir, longer, config.stages)
    ranks.barrier()  # nobody writes before all have compared

    def write() -> None:
        make_folder(run_dir, within=run_dir)
        if longer:
            set_aside(run_dir, longer, config)
        write_whole(path, to_yaml(config))

    together(write if ranks.is_main else lambda: None, ranks)
    return longer


def new_watchdog(config: Config, ranks: Ranks, *, beats_in: Path | None = None) -> Watchdog:
    """Make the watchdog of this attempt, not yet started. Call on every rank.

    `beats_in`: where the attempt makes a folder of its own for its heartbeats, which are else the run's.
    """
    limits, retry_for_s = config.watchdog, config.data.storage.retry_for_s
    if limits.enabled and limits.step_s <= retry_for_s and "://" in f"{config.data.source} {config.data.target}":
        raise ValueError(
            f"watchdog.step_s={limits.step_s} must be above data.storage.retry_for_s={retry_for_s}, so that a store "
            f"that comes back in time is waited for; use {2 * retry_for_s:g}."
        )
    ranks.set_timeout(limits.collective_s, of_saves=True)
    run_dir, attempt = Path(config.run_dir), ranks.from_main(f"{time.time()} {os.getpid()}")
    place = beats_in / attempt.replace(" ", "_") if beats_in else run_dir
    beats = place / "heartbeats"
    for folder in (beats, run_dir / "logs"):
        refuse_links(folder, within=run_dir)
    refuse_unless_plain(run_dir / "events.jsonl")
    watchdog = Watchdog(run_dir, limits, ranks=ranks, attempt=attempt, beats_in=place)

    def clear() -> None:
        watchdog.refusal.forget()
        for path in beats.glob("rank_*.json"):  # left by an attempt on more ranks
            path.unlink(missing_ok=True)
        for folder in (run_dir, beats):
            remove_left_overs(folder, older_than_s=LEFT_OVER_AFTER_S)
        for folder in beats_in.glob("*") if beats_in else ():
            _remove_if_left_over(folder)

    together(clear if ranks.is_main else lambda: None, ranks)
    return watchdog


def _remove_if_left_over(folder: Path) -> None:
    """Remove the heartbeats of an attempt that was killed long ago."""
    with suppress(OSError):  # another process may have removed it
        newest = max(path.stat().st_mtime for path in (folder, *walk(folder)))
        if is_of_beats(folder) and time.time() - newest > LEFT_OVER_AFTER_S:
            clear_away(folder)
