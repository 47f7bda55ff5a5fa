"""Sections of the page in words and tables: state of the runs, scores, settings, restarts and checkpoints."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from iccld.durable import is_real_folder
from iccld.programs.report.markup import Markup, joined, section, swatch, table, tag
from iccld.programs.run.ledger import hours
from iccld.programs.run.metric_lines import number
from iccld.programs.run.record import ABSENT, Record, differing, words_of
from iccld.programs.run.saved_scores import MEANS, SavedScores
from iccld.redact import redact
from iccld.runtime.checkpoint.manifest import MANIFEST
from iccld.texts import shown

NO_VALUE = Markup("&ndash;")
MAX_CHECKPOINTS = 200  # that are listed, of a stage
MAX_ROWS = 400  # of a table of settings


def overview(records: Sequence[Record]) -> Markup:
    """Show how each run stands, a column a run."""
    rows = [(name, *(words[name] for words in map(_standing, records))) for name in _standing(records[0])]
    return section("Overview", table(["", *(record.name for record in records)], rows))


def _standing(record: Record) -> dict[str, str]:
    stage, step = record.position
    planned = number(record.settings.get(f"{stage}.trainer.num_steps"))
    layout: Any = next((event.get("layout") for event in reversed(record.events) if event["event"] == "started"), None)
    layout = layout if isinstance(layout, dict) else {}
    newest = record.entries[-1] if record.entries else {}
    timed = next((entry for entry in reversed(record.entries) if number(entry.get("samples_per_s"))), newest)
    speed, memory = number(timed.get("samples_per_s")), number(timed.get("peak_gib"))
    ranks = [shown(str(layout[name])) for name in ("engine", "world_size", "precision") if name in layout]
    return {
        "state": tag("span", record.state, class_=f"state {record.state.split()[0]}"),
        "stage and step": f"{stage}, {step:,}" + (f" of {planned:,.0f}" if planned else "") if stage else NO_VALUE,
        "last mIoU": _score(record.score),
        "best mIoU": _score(record.best_score),
        "goodput": NO_VALUE if record.goodput is None else f"{100 * record.goodput:.1f} %",
        "wall time": hours(sum(record.seconds.values())) if record.attempts else NO_VALUE,
        "attempts": str(len(record.attempts)),
        "samples per second": NO_VALUE if speed is None else f"{speed:.3g}",
        "memory of a rank": NO_VALUE if memory is None else f"{memory:.2f} GiB",
        "engine, ranks, precision": ", ".join(ranks) or NO_VALUE,
    }


def _score(score: tuple[str, float] | None) -> str:
    return NO_VALUE if score is None else f"{score[1]:.2f} % ({score[0]})"


def differences(records: Sequence[Record]) -> Markup:
    """Show the settings that are not the same in all of several runs."""
    if len(records) < 2:
        return Markup("")
    rows = [(key, *map(words_of, values)) for key, values in sorted(differing(records).items())]
    shown_rows = table(["setting", *(record.name for record in records)], rows[:MAX_ROWS], class_="settings")
    same = tag("p", "The runs have the same settings.")
    about = f"A setting that a run does not know is shown as {ABSENT}; run_dir is left out."
    return section("Differences", shown_rows if rows else same, about=about)


def scores(records: Sequence[Record], colours: Mapping[str, str]) -> Markup:
    """Show final scores by class: all of one run, or the last stage's of several with their gains over the first."""
    columns = _columns(records)
    if not columns:
        return Markup("")
    several, of_all = len(records) > 1, list(columns.values())
    rows: list[list[str]] = [["images", *(f"{found.num_images:,}" for found in of_all)]]
    for key, label in MEANS.items():
        rows.append([tag("b", label), *_cells([found.means[key] for found in of_all], None, with_gain=several)])
    for name in dict.fromkeys(name for found in of_all for name in found.iou):
        colour = colours.get(name, "#888888")
        head = joined([swatch(colour), shown(name)[:100]])
        rows.append([head, *_cells([found.iou.get(name) for found in of_all], colour, with_gain=several)])
    about = "IoU of each class on the validation set, in per cent. "
    if several:
        about += "Of each run the last stage. One run each: how much a score moves from seed to seed is not shown here."
        sets = {name for record in records if record.results.scores and (name := record.results.scored_set)}
        about += " The runs were scored on different sets!" if len(sets) > 1 else ""
    return section("Scores", table(["%", *columns], rows, class_="scores"), about=about)


def _columns(records: Sequence[Record]) -> dict[str, SavedScores]:
    if len(records) == 1:
        return dict(records[0].results.scores)
    found = [(record, last) for record in records if (last := record.results.last)]
    return {f"{record.name}, {last[0]}": last[1] for record, last in found}


def _cells(values: Sequence[float | None], colour: str | None, *, with_gain: bool) -> Iterator[str]:
    """Write a number with a bar for each value, and with its gain over the first."""
    first = values[0]
    for i, value in enumerate(values):
        if value is None:
            yield NO_VALUE
            continue
        fill = f"width:{min(max(value, 0.0), 100.0):.1f}%" + (f";background:{colour}" if colour else "")
        meter = tag("div", tag("i", style=fill), class_="meter")
        gain = _gain(value - first) if with_gain and i and first is not None else ""
        yield tag("div", tag("span", f"{value:.2f}"), meter, gain, class_="value")


def _gain(difference: float) -> Markup:
    return tag("span", f"{difference:+.2f}", class_="up" if difference > 0 else "down" if difference < 0 else None)


def diagnostics(records: Sequence[Record]) -> Markup:
    """Show the scores under other latents, if they were measured."""
    parts: list[Markup] = []
    for record in records:
        for stage, figures in record.results.diagnostics.items():
            rows = [
                (shown(latent), *(_number(figure.get(name)) for name in ("miou", "boundary_miou", "changed")))
                for latent, figure in figures.items()
            ]
            title = shown(stage) if len(records) == 1 else f"{record.name}, {shown(stage)}"
            head = [title, "mIoU", "boundary mIoU", "pixels changed"]
            parts += [table(head, rows)] if rows else []
    about = "Scores of a few validation images under another latent, in per cent; compare them with one another alone."
    return section("Diagnostics", tag("div", *parts, class_="columns") if parts else "", about=about)


def _number(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.2f}"


def warnings(records: Sequence[Record]) -> Markup:
    """List the warnings of the runs, and what ended attempts."""
    items = [
        tag("li", tag("b", _where(record, event, several=len(records) > 1)), " ", shown(redact(str(_words(event)))))
        for record in records
        for event in record.events
        if event["event"] in ("warning", "out_of_memory", "unfit", "stopped")
    ]
    return section("Warnings", tag("ul", *items, class_="warnings") if items else "")


def _words(event: Mapping[str, Any]) -> Any:
    return event.get("words") or event.get("what") or event.get("phase") or ""


def _where(record: Record, event: Mapping[str, Any], *, several: bool) -> str:
    kind = "" if event["event"] == "warning" else event["event"].replace("_", " ")
    words = [record.name if several else "", str(event.get("stage") or ""), kind]
    return f"{', '.join(shown(word) for word in words if word)}:"


def restarts(records: Sequence[Record]) -> Markup:
    """List the attempts of each run."""
    head = ["launched", "down before", "lasted", "steps", "redone", "last event"]
    parts: list[Markup] = []
    for record in records:
        rows = [
            (
                time.strftime("%F %T", time.localtime(attempt.began)),
                hours(attempt.seconds["down"]),
                hours(attempt.ended - attempt.began),
                f"{attempt.num_steps:,}",
                hours(attempt.seconds["redone"]),
                shown(attempt.last),
            )
            for attempt in record.attempts[-MAX_ROWS:]
        ]
        parts += [_titled(record, records), table(head, rows)] if rows else []
    return section("Restarts", *parts, about="Each attempt at a run; the same command goes on after an interruption.")


def checkpoints(records: Sequence[Record]) -> Markup:
    """List the checkpoints that are there, and the finished models."""
    parts: list[Markup] = []
    for record in records:
        rows = [row for stage in record.all_stages for row in _checkpoints(record.run_dir / stage, stage)]
        parts += [_titled(record, records), table(["stage", "step", "GiB", ""], rows)] if rows else []
    return section("Checkpoints", *parts)


def _checkpoints(folder: Path, stage: str) -> Iterator[tuple[str, str, str, str]]:
    steps = sorted((folder / "checkpoints").glob("step_*"))[-MAX_CHECKPOINTS:] if is_real_folder(folder) else []
    for path in filter(is_real_folder, steps):
        step = path.name.removeprefix("step_")
        whole = "" if (path / MANIFEST).is_file() else "not whole"
        with contextlib.suppress(FileNotFoundError):  # a training removes old ones meanwhile
            yield stage, f"{int(step):,}" if step.isdecimal() else shown(step), _gib(path), whole
    for weights in ("teacher", "student"):
        if is_real_folder(model := folder / "final" / weights):
            yield stage, "final", _gib(model), f"model of the {weights}"


def _gib(folder: Path) -> str:
    return f"{sum(path.lstat().st_size for path in folder.iterdir()) / (1 << 30):.3f}"


def _titled(record: Record, records: Sequence[Record]) -> Markup:
    return tag("h3", record.name) if len(records) > 1 else Markup("")


def changed_settings(records: Sequence[Record], defaults: Mapping[str, Any]) -> Markup:
    """List the settings that are not at their default, and all of them, folded away."""
    keys = sorted({key for record in records for key in record.settings} - {"run_dir"})
    rows = []
    for key in keys:
        values = [record.settings.get(key, ABSENT) for record in records]
        if any(value not in (ABSENT, defaults.get(key)) for value in values):
            usual = words_of(defaults[key]) if key in defaults else NO_VALUE
            rows.append((key, *map(words_of, values), usual))
    head = ["setting", *(record.name if len(records) > 1 else "value" for record in records), "default"]
    parts = [table(head, rows[:MAX_ROWS], class_="settings")] if rows else []
    for record in records:
        all_of_it = [(key, words_of(value)) for key, value in record.settings.items()]
        title = "All settings" + (f" of {record.name}" if len(records) > 1 else "")
        if all_of_it:
            parts.append(
                tag("details", tag("summary", title), table(["setting", "value"], all_of_it, class_="settings"))
            )
    return section("Settings", *parts, about="What differs from the defaults of this version, and then everything.")


def notes(records: Sequence[Record]) -> Markup:
    """List the parts of the runs that could not be read."""
    items = [tag("li", f"{record.name}: {note}") for record in records for note in record.notes]
    return section("Notes", tag("ul", *items) if items else "")
