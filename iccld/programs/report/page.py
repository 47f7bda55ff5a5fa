"""Page of a report: one HTML file that needs nothing else, and may fetch nothing (its own policy forbids it)."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from iccld import __version__
from iccld.programs.report import figures, sections
from iccld.programs.report.classes import class_colours
from iccld.programs.report.markup import Markup, joined, tag
from iccld.programs.run.record import Record

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(records: Sequence[Record], defaults: Mapping[str, Any]) -> str:
    """Write the whole file. `defaults`: the settings' usual values by their whole names."""
    colours = class_colours(records)
    title = records[0].name if len(records) == 1 else f"{len(records)} runs"
    parts = [
        sections.overview(records),
        sections.differences(records),
        sections.warnings(records),
        sections.scores(records, colours),
        figures.curves(records),
        figures.pictures(records, colours),
        figures.wall_time(records),
        sections.diagnostics(records),
        sections.restarts(records),
        sections.checkpoints(records),
        sections.changed_settings(records, defaults),
        sections.notes(records),
    ]
    header = tag("header", tag("h1", title), tag("p", f"Written by iccld {__version__}", class_="about"))
    return f"<!doctype html>\n{tag('html', _head(title), tag('body', header, tag('main', *parts)), lang='en')}\n"


def _head(title: str) -> Markup:
    metas = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="color-scheme" content="light dark">'
    )
    style = f"<style>{_style()}</style>"
    return tag("head", joined([Markup(metas), tag("title", f"{title} - iccld"), Markup(style)]))


@cache
def _style() -> str:
    return resources.files("iccld.programs.report").joinpath("style.css").read_text()
