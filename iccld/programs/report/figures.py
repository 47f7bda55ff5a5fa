"""The parts of the page that are drawn: curves, time, and pictures with their legend."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from iccld.programs.report.charts import line_chart, stacked_bars
from iccld.programs.report.markup import Markup, section, swatch, tag
from iccld.programs.report.pictures import Picture, pictures_of
from iccld.programs.run.ledger import CATEGORIES
from iccld.programs.run.metric_lines import curve, names_of
from iccld.programs.run.record import Record
from iccld.texts import shown

CURVES = {
    "loss": "sum of the losses",
    "loss/": "losses",
    "learning_rate": "learning rate",
    "learning_rate/": "learning rates",
    "gradient_norm": "norm of the gradients",
    "miou": "mIoU in training, %",
    "boundary_miou": "boundary mIoU in training, %",
    "iou/": "IoU by class in training, %",
    "disagreement": "student and teacher differ: share of pixels",
    "pseudo_classes/distance": "classes of pseudo-labels and source: distance",
    "accuracy/": "accuracy of the discriminator",
    "samples_per_s": "samples per second",
    "data_wait": "share of time waiting for data",
    "peak_gib": "memory of a rank, GiB",
}
"""Metrics to draw, with titles. With a slash at the end: all metrics that begin so, in one chart of one run."""
MAX_CURVES = 20  # in a chart
MAX_BARS = 20  # attempts


def curves(records: Sequence[Record]) -> Markup:
    """Charts of each stage: of one run its losses and rates, of several each metric side by side."""
    parts: list[Markup] = []
    for stage in dict.fromkeys(stage for record in records for stage in record.all_stages):
        charts = list(_of_one(records[0], stage) if len(records) == 1 else _of_several(records, stage))
        parts += [tag("h3", stage), tag("div", *charts, class_="charts")] if charts else []
    return section("Curves", *parts)


def _of_one(record: Record, stage: str) -> Iterator[Markup]:
    names, of = names_of(record.entries, stage=stage), partial(curve, record.entries, stage=stage)
    for key, title in CURVES.items():
        found = [name for name in names if name.startswith(key) and "t_bin" not in name] if key.endswith("/") else [key]
        series = [(shown(name.removeprefix(key)), of(name)) for name in found[:MAX_CURVES]]
        if chart := line_chart(title, series):
            yield chart


def _of_several(records: Sequence[Record], stage: str) -> Iterator[Markup]:
    names = {name for record in records for name in names_of(record.entries, stage=stage)}
    parts = sorted(name for name in names if name.startswith(("loss/", "learning_rate/")))[:MAX_CURVES]
    titles = {"loss": CURVES["loss"]} | {key: shown(key) for key in parts}
    for key, title in (titles | {key: title for key, title in CURVES.items() if not key.endswith("/")}).items():
        series = [(record.name, curve(record.entries, key, stage=stage)) for record in records]
        if chart := line_chart(title, series, has_legend=True):
            yield chart


def wall_time(records: Sequence[Record]) -> Markup:
    """Draw the shares of the wall time: a bar for each run and, for a single run, one for each attempt."""
    timed = [record for record in records if record.attempts]
    if not timed:
        return Markup("")
    rows = [(record.name if len(records) > 1 else "all", list(record.seconds.values())) for record in timed]
    if len(records) == 1 and len(timed[0].attempts) > 1:
        first = max(0, len(timed[0].attempts) - MAX_BARS)
        for i, attempt in enumerate(timed[0].attempts[first:], start=first + 1):
            rows.append((f"attempt {i}", list(attempt.seconds.values())))
    colours = [colour for _, colour in CATEGORIES.values()]
    keys = [
        tag("li", swatch(colour), tag("b", name), f" {meaning}{_share(records, name)}")
        for name, (meaning, colour) in CATEGORIES.items()
    ]
    return section("Time and goodput", stacked_bars(rows, colours), tag("ul", *keys, class_="legend long"))


def _share(records: Sequence[Record], name: str) -> str:
    if len(records) > 1:
        return ""
    seconds = records[0].seconds
    return f": {100 * seconds[name] / max(sum(seconds.values()), 1e-9):.1f} %"


def pictures(records: Sequence[Record], colours: Mapping[str, str]) -> Markup:
    """The pictures that the runs hold, under one legend of the classes."""
    parts: list[Markup] = []
    for record in records:
        figures = [tag("figure", _image(it), tag("figcaption", it.name)) for it in pictures_of(record)]
        if figures:
            parts += [tag("h3", record.name)] if len(records) > 1 else []
            parts.append(tag("div", *figures, class_="pictures"))
    if not parts:
        return Markup("")
    keys = [tag("li", swatch(colour), name) for name, colour in colours.items()]
    return section("Pictures", tag("ul", *keys, class_="legend classes") if keys else "", *parts)


def _image(picture: Picture) -> Markup:
    return tag("img", src=picture.url, alt=picture.name, width=picture.width, height=picture.height)
