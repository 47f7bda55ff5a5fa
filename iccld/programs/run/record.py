"""Record of a run, read from its directory without torch: the run may be unfinished, torn, old or a stranger's.

What cannot be read is left out, and a note says so. Secrets that an earlier version or another hand left are hidden.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from iccld.durable import is_real_folder
from iccld.plain_yaml import read_yaml
from iccld.programs.run.event_times import Event, read_events, straightened
from iccld.programs.run.ledger import Attempt, attempts, is_of_scoring, total_of
from iccld.programs.run.metric_lines import curve, read_entries
from iccld.programs.run.saved_scores import NOTHING, SavedResults, read_own
from iccld.reading import read_limited
from iccld.redact import redact, redacted
from iccld.runtime.faults.lock import RELEASED
from iccld.schema import flat
from iccld.texts import shown

T = TypeVar("T")

STAGE_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
"""The name of a stage, and so of a folder; a run directory may be a stranger's."""
MAX_STAGES = 20
BEAT_S = 60.0
"""A lock that was written more recently than this is held by a run that lives."""
SECTION = ".trainer.num_steps"
"""End of a setting that each stage's section has."""
PLACED = ("progress", "started", "finished")
"""Events that say how far a stage is."""
RUN_FILES = ("config.yaml", "events.jsonl", "metrics.jsonl")
"""The files of which a run directory has at least one."""


@dataclass
class Record:
    """One run. `settings` by whole names, as `stage1.trainer.num_steps`; `notes` say what was left out, and why."""

    run_dir: Path
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    results: SavedResults = NOTHING
    notes: list[str] = field(default_factory=list)

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Return the attempts, oldest first; [] if the events tell of none."""
        return attempts(self.events) if any(event["event"] == "launched" for event in self.events) else []

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of all attempts, by category."""
        return total_of(self.attempts)

    @property
    def goodput(self) -> float | None:
        """Return the share of the wall time that went into steps that count, in [0, 1]; None if it is not known."""
        wall = sum(self.seconds.values())
        return self.seconds["training"] / wall if wall else None

    @cached_property
    def all_stages(self) -> list[str]:
        """Return the stages that the settings, events or lines name, those of the settings in the order of training."""
        sections = [key.removesuffix(SECTION) for key in self.settings if key.endswith(SECTION)]
        lines = (*(event for event in self.events if event["event"] in PLACED), *self.entries)
        found = [*sections, *(self._chosen() or []), *(line.get("stage") for line in lines)]
        names = dict.fromkeys(name for name in found if isinstance(name, str) and STAGE_NAME.fullmatch(name))
        return [*names][:MAX_STAGES]

    @property
    def stages(self) -> list[str]:
        """Return the stages that the run trains."""
        chosen = self._chosen()
        return [stage for stage in self.all_stages if chosen is None or stage in chosen]

    def _chosen(self) -> list[Any] | None:
        given = self.settings.get("stages")
        return given if isinstance(given, list) else None

    @property
    def position(self) -> tuple[str, int]:
        """Return the stage that was trained last, and its steps done; ("", 0) before the first."""
        for event in reversed(self.events):
            if event["event"] in PLACED and event.get("stage") in self.all_stages:
                step = event.get("step")
                return event["stage"], step if isinstance(step, int) else 0
        return "", 0

    @property
    def score(self) -> tuple[str, float] | None:
        """Return name and mIoU in per cent of the newest score: of a stage's results, else of its newest training line.

        Lines of a later stage than the results' are newer.
        """
        last, found = self.results.last, None
        for stage in dict.fromkeys([*self.all_stages, *self.results.of_stages.values()]):
            if values := self.mious(stage):
                found = stage, values[-1][1]
            if last and self.results.of_stages[last[0]] == stage and (miou := last[1].means["miou"]) is not None:
                found = last[0], miou
        return found

    @property
    def best_score(self) -> tuple[str, float] | None:
        """Return the name and mIoU in per cent of the best score, also in training; the mean latent is no model."""
        found = [(stage, miou) for stage in self.all_stages for _, miou in self.mious(stage)]
        for label, scores in self.results.scores.items():
            miou = scores.means["miou"]
            found += [(label, miou)] if label.startswith(tuple(self.all_stages)) and miou is not None else []
        return max(found, key=lambda pair: pair[1], default=None)

    def mious(self, stage: str) -> list[tuple[int, float]]:
        """Return the steps done and the mIoU of the scores in training."""
        return curve(self.entries, "miou", stage=stage)

    @cached_property
    def state(self) -> str:
        """Return `running`, `finished`, `stopped` (by a signal), `failed` (by an error or a kill), or `not started`."""
        if _is_held(self.run_dir):
            return "running"
        if self.stages and all(is_real_folder(self.run_dir / stage / "final") for stage in self.stages):
            return "finished"
        kinds = [event["event"] for event in self.events if event["event"] != "saved" and not is_of_scoring(event)]
        if not kinds:
            return "not started"
        return "stopped" if kinds[-1] == "preempted" else "failed"


def is_run(folder: Path) -> bool:
    """Tell whether a folder looks like a run directory, also of a run that is torn."""
    return sum((folder / mark).is_file() for mark in RUN_FILES) >= (2 if not (folder / "events.jsonl").is_file() else 1)


def read_record(run_dir: Path, name: str = "") -> Record:
    """Read everything that is there. Raises ValueError if there is no run."""
    if not is_run(run_dir):
        raise ValueError(f"there is no run in {run_dir} (no events.jsonl); give a folder that train wrote.")
    record = Record(run_dir, name or shown(run_dir.resolve().name))

    def tried(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (ValueError, OSError) as error:
            record.notes.append(shown(redact(str(error))))
            return otherwise

    record.settings = tried(lambda: _settings(run_dir), {})
    events, lost = tried(lambda: read_events(run_dir), ([], []))
    record.events, moved = straightened(events)
    record.notes += [shown(note) for note in (*lost, *moved)]
    record.entries = tried(lambda: read_entries(run_dir), [])
    record.results = tried(lambda: read_own(run_dir), NOTHING)
    return record


def read_records(run_dirs: Sequence[Path]) -> list[Record]:
    """Read several runs, named by their paths below their common folder. Raises ValueError if one is no run."""
    paths = [path.resolve() for path in run_dirs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{', '.join(map(str, run_dirs))}: one run is given twice; give each once.")
    top = os.path.commonpath(path.parent for path in paths)
    return [read_record(path, shown(str(path.relative_to(top)))) for path in paths]


def differing(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs: their values, `ABSENT` in a run without the setting."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    values = {key: [record.settings.get(key, ABSENT) for record in records] for key in keys if key != "run_dir"}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row[1:])}


ABSENT = "-"


def words_of(value: Any) -> str:
    """Write a setting's value for a person, in one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(words_of, value))}]"
    return shown(str(value)) if str(value) else "''"


def _settings(run_dir: Path) -> dict[str, Any]:
    values = read_yaml(run_dir / "config.yaml")
    if not isinstance(values, dict):
        raise ValueError(f"{run_dir / 'config.yaml'}: not the settings of a run.")
    return {shown(str(key)): value for key, value in flat(redacted(values)).items()}


def _is_held(run_dir: Path) -> bool:
    """Tell whether a job holds the run. The lock is only read: to try it would refuse a job that starts meanwhile."""
    path = run_dir / "lock"
    try:
        record = read_limited(path).decode(errors="replace").strip()
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return False
    return record not in ("", RELEASED) and age < BEAT_S
