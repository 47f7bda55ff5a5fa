"""`iccld runs ROOT`: the runs below a folder, with the settings in which each differs from most others."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from iccld.programs.run.metric_lines import number
from iccld.programs.run.record import ABSENT, Record, differing, is_run, read_records, words_of
from iccld.tables import cell, table_console

DESCRIPTION = """\
List the runs below a folder: state, stage, step, last and best mIoU, goodput, and the settings that differ.
running: a job holds it; stopped: a signal ended it; failed: an error did, or it was killed; finished: all stages are.
Nothing is written. Exit status: 0, or 2 where there is no run.
"""
MAX_DEPTH = 8
MAX_DIFFERENCES = 6  # the most settings that a run's row shows


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `iccld runs`."""
    parser.add_argument("root", type=Path, metavar="ROOT")


def run(arguments: Namespace) -> int:
    """Print the table. Raises ValueError if there is no run."""
    root = arguments.root
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give one that holds run directories.")
    folders = sorted(run_dirs(root))
    if not folders:
        raise ValueError(f"there is no run in or below {root} (no folder with events.jsonl); give another folder.")
    records = read_records(folders)
    table_console().print(table_of(records))
    for record in records:
        for note in record.notes:
            print(f"note: {record.name}: {note}")
    return 0


def run_dirs(root: Path) -> Iterator[Path]:
    """Find the run directories in and below a folder. Links are not followed, and runs are not searched for further
    ones.
    """
    for parent, folders, _ in os.walk(root):
        place = Path(parent)
        if is_run(place):
            yield place
            folders.clear()
        elif len(place.relative_to(root).parts) >= MAX_DEPTH:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]


def table_of(records: Sequence[Record]) -> Table:
    """Make a table with a row for each run."""
    table = Table("run", "state", "stage", title=None)
    for name in ("step", "last", "best", "goodput"):
        table.add_column(name, justify="right")
    table.add_column("differs in", overflow="fold")
    different = differing(records)
    for number_of, record in enumerate(records):
        stage, step = record.position
        planned = number(record.settings.get(f"{stage}.trainer.num_steps"))
        table.add_row(
            cell(record.name),
            record.state,
            cell(stage or ABSENT),
            f"{step}/{planned:.0f}" if planned else str(step),
            _score(record.score),
            _score(record.best_score),
            ABSENT if record.goodput is None else f"{100 * record.goodput:.1f} %",
            cell(_differences(different, number_of)),
        )
    return table


def _score(score: tuple[str, float] | None) -> str:
    return ABSENT if score is None else f"{score[1]:.2f}"


def _differences(different: dict[str, list[Any]], number_of: int) -> str:
    """Return `key=value` of a run for each setting that most others have set otherwise."""
    pairs = {key: values[number_of] for key, values in different.items() if _is_unusual(values, number_of)}
    words = [f"{key}={words_of(value)}" for key, value in pairs.items()]
    more = len(words) - MAX_DIFFERENCES
    return " ".join(words[:MAX_DIFFERENCES]) + (f" and {more} more (iccld compare)" if more > 0 else "")


def _is_unusual(values: Sequence[Any], number_of: int) -> bool:
    """Tell whether at most half of the runs have this one's value; settings that a version lacks do not count."""
    return ABSENT not in values and 2 * values.count(values[number_of]) <= len(values)
