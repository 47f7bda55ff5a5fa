"""Description of a set of shards: a table, and a bar chart of its classes."""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.table import Table

from iccld.data.shards.verifying import STORAGE
from iccld.data.storage import integrity
from iccld.data.storage.index import NUM_TRAIN_IDS, IndexHeader, ShardIndex
from iccld.data.storage.open import open_storage
from iccld.data.storage.open_index import open_index
from iccld.durable import replacing
from iccld.labels import IGNORE_INDEX
from iccld.tables import cell, table_console
from iccld.texts import shown

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def class_shares(header: IndexHeader) -> list[tuple[str, float, int, float]]:
    """Return for each class its name, its share of the labelled pixels, the samples that show it, and their share."""
    total = max(sum(header.class_pixels), 1)
    return [
        (name, pixels / total, count, count / max(header.num_samples, 1))
        for name, pixels, count in zip(header.class_set.names, header.class_pixels, header.class_samples, strict=True)
    ]


def lacking_classes(header: IndexHeader) -> list[str]:
    """Return the classes that no pixel of the labels shows."""
    return [name for name, _, count, _ in class_shares(header) if not count]


def facts(index: ShardIndex) -> list[tuple[str, str]]:
    """Return names and values of the facts about the set as a whole."""
    header = index.header
    low, high = (f"{height}x{width}" for height, width in (header.min_size, header.max_size))
    tars = int(index.shards["size"].sum())
    return [
        ("data set", header.dataset or "(not named)"),
        ("samples", f"{header.num_samples:,}, {'all' if header.has_labels else 'none'} with labels"),
        ("left out", f"{header.settings.get('left_out', 'not known how many')} bad ones when it was made"),
        ("shards", f"{header.num_shards:,}, {_amount(tars)}"),
        (
            "images and labels",
            f"{_amount(header.num_bytes)}, {_amount(header.num_bytes / header.num_samples)} a sample",
        ),
        ("height x width", low if low == high else f"from {low} to {high}"),
        ("index", f"{index.fingerprint()['index']}, version {header.version}"),
    ]


def _amount(size: float) -> str:
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.{0 if unit == 0 else 1}f} {_UNITS[unit]}"


def tables(index: ShardIndex) -> list[Table]:
    """Return the table of the facts and, if there are labels, that of the classes."""
    overview = Table(title=cell(index.location), show_header=False)
    for row in facts(index):
        overview.add_row(*map(cell, row))
    if not index.header.has_labels:
        return [overview]
    classes = Table(title="classes", caption=f"Pixels of {IGNORE_INDEX} are not counted.")
    for heading in ("id", "class"):
        classes.add_column(heading)
    for heading in ("pixels %", "samples", "samples %"):
        classes.add_column(heading, justify="right")
    for i, (name, pixels, count, samples) in enumerate(class_shares(index.header)):
        classes.add_row(str(i), cell(name), f"{100 * pixels:.3f}", f"{count:,}", f"{100 * samples:.1f}")
    return [overview, classes]


def draw_chart(index: ShardIndex, path: Path) -> None:
    """Draw a bar chart of the classes as PNG. Raises ValueError for a set without labels or if it cannot be written."""
    if not index.header.has_labels:
        raise ValueError(
            f"--chart {path}: {index.location} has no labels, so there are no classes to draw; leave it out."
        )
    from matplotlib.figure import Figure  # slow to import; a bare Figure needs no display

    names, pixels, _, samples = zip(*class_shares(index.header), strict=True)
    colours = [tuple(value / 255 for value in colour) for colour in index.header.class_set.palette]
    figure = Figure(figsize=(12, max(2.0, 7.5 * len(names) / NUM_TRAIN_IDS)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    least = min((100 * share for share in pixels if share), default=1.0)
    floor = 10.0 ** math.floor(math.log10(least) - 0.3)  # below the shortest bar, so that it can be seen
    for axes, shares, shortest in ((left, pixels, floor), (right, samples, 0.0)):
        lengths = [max(100 * share, shortest) for share in shares]
        bars = axes.barh(names, lengths, color=colours, edgecolor="#444444", linewidth=0.6, height=0.75)
        axes.bar_label(bars, [_percent(100 * share) for share in shares], padding=4, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.tick_params(axis="y", length=0, labelsize=11)
    left.set(xscale="log", xlim=(floor, 250), ylim=(len(names) - 0.4, -0.6), xlabel="% of labelled pixels (log scale)")
    left.xaxis.set_major_formatter("{x:g}")
    right.set(xlim=(0, 118), xlabel="% of samples that show the class")
    title = index.header.dataset or Path(index.location).name
    figure.suptitle(f"{title}: {index.header.num_samples:,} samples", fontsize=14, parse_math=False)
    try:
        with replacing(path) as file:
            figure.savefig(file, dpi=120, format="png")
    except OSError as error:
        raise ValueError(
            f"--chart {path} cannot be written ({error.strerror}); give a file in a folder that is there."
        ) from error


def _percent(value: float) -> str:
    return "0" if value == 0 else f"{value:.1f}" if value >= 1 else f"{value:#.2g}"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `iccld shards info`."""
    parser.add_argument("location", metavar="DIR_OR_URL", help="a set of shards with its index")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the classes' shares")
    parser.add_argument("--keys", action="store_true", help="only print all keys, one a line")


def run(arguments: Namespace) -> int:
    """Print the tables, or the keys. Raises ValueError if the user erred."""
    index = open_index(open_storage(arguments.location, STORAGE), arguments.location)
    integrity.ensure(index)
    if arguments.keys:
        for position in range(len(index)):
            print(shown(index.key(position)))
        return 0
    if arguments.chart:
        draw_chart(index, arguments.chart)
    for table in tables(index):
        table_console().print(table)
    if arguments.chart:
        print(f"chart: {arguments.chart}")
    return 0
