"""`iccld compare A B`: the settings and scores in which two runs differ, paired by class."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from iccld.programs.run.record import ABSENT, Record, differing, read_records, words_of
from iccld.programs.run.saved_scores import MEANS, SavedScores
from iccld.tables import cell, table_console
from iccld.texts import shown

DESCRIPTION = """\
Show the settings and the scores in which two runs differ, class by class, and where they stand.
Nothing is written. Exit status: 0, also where nothing differs, or 2 where there is no run.
"""
Pair = tuple[str, SavedScores, SavedScores]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `iccld compare`."""
    parser.add_argument("run_dirs", type=Path, nargs=2, metavar="RUN_DIR")


def run(arguments: Namespace) -> int:
    """Print the tables. Raises ValueError if there is no run."""
    one, other = read_records(arguments.run_dirs)
    console = table_console()
    for table in tables_of(one, other):
        console.print(table)
    scored = pairs(one, other)
    if same := [label for label, before, after in scored if before == after]:
        print(f"the same scores: {', '.join(map(shown, same))}")
    sets = [shown(record.results.scored_set) for record in (one, other)]
    if scored and all(sets) and sets[0] != sets[1]:
        print(f"the runs were scored on different sets: {sets[0]} and {sets[1]}")
    if not scored:
        print("no final scores to compare: one of the runs has none yet")
    for record in (one, other):
        for note in record.notes:
            print(f"note: {record.name}: {note}")
    return 0


def tables_of(one: Record, other: Record) -> Iterator[Table]:
    """Make the tables: how both runs stand, the settings that differ, and the scores of each pair."""
    names = [cell(record.name) for record in (one, other)]
    standing = Table("", *names)
    for label, words in (
        ("state", lambda record: record.state),
        ("stage, step", lambda record: f"{record.position[0] or ABSENT}, {record.position[1]}"),
        ("goodput", lambda record: ABSENT if record.goodput is None else f"{100 * record.goodput:.1f} %"),
    ):
        standing.add_row(label, cell(words(one)), cell(words(other)))
    yield standing
    settings = Table("setting", *names, title="settings that differ")
    for key, values in sorted(differing([one, other]).items()):
        settings.add_row(cell(key), *(cell(words_of(value)) for value in values))
    if settings.row_count:
        yield settings
    for pair in pairs(one, other):
        if pair[1] != pair[2]:
            yield _scores(pair, names)


def pairs(one: Record, other: Record) -> list[Pair]:
    """Pair the scores that both runs have; two runs that share none are compared by their last stages."""
    mine, theirs = one.results.scores, other.results.scores
    shared = [(label, mine[label], theirs[label]) for label in mine if label in theirs]
    if shared or one.results.last is None or other.results.last is None:
        return shared
    (label, scores), (other_label, other_scores) = one.results.last, other.results.last
    return [(f"{label} and {other_label}", scores, other_scores)]


def _scores(pair: Pair, names: list[str]) -> Table:
    """Make a table of the means, then the classes, with the second run's gain over the first."""
    label, one, other = pair
    table = Table("%", title=cell(label))
    for name in (*names, "difference"):
        table.add_column(name, justify="right")
    rows = [(title, one.means[key], other.means[key]) for key, title in MEANS.items()]
    classes = dict.fromkeys([*one.iou, *other.iou])
    rows += [(name, one.iou.get(name), other.iou.get(name)) for name in classes]
    for number, (name, before, after) in enumerate(rows):
        gain = ABSENT if before is None or after is None else f"{after - before:+.2f}"
        table.add_row(cell(name), _words(before), _words(after), gain, end_section=number == len(MEANS) - 1)
    return table


def _words(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"
