"""Line charts and stacked bars as inline SVG. Colours are the page's, so that they follow its light or dark scheme."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iccld.programs.report.markup import Markup, joined, tag

WIDTH, HEIGHT = 430, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 38
MAX_POINTS = 400
"""The most points of a curve; longer curves are thinned evenly, and keep the last point."""
MAX_MARKED_POINTS = 40
"""The most points that are marked one by one."""
NUM_COLOURS = 8
TINY, HUGE = 1e-100, 1e100
LOG_FROM = 50.0
"""The ratio of the largest to the smallest value from which the axis is logarithmic."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels; `ticks` are values."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = map(math.log10, (low, high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _drawn(points: Points) -> Points:
    """Return a curve as an axis can hold it: without values that are too large, and 0 for those that are too small."""
    return [(x, y if abs(y) > TINY else 0.0) for x, y in _thinned(points) if abs(y) < HUGE]


def line_chart(title: str, curves: Sequence[tuple[str, Points]], *, has_legend: bool = False) -> Markup:
    """Draw a figure with one line for each curve over the steps done; nothing if no curve has a point.

    A curve's colour is that of its place among all, also of those without points. A legend names several curves;
    `has_legend`: also one.
    """
    lines = {i: (name, drawn) for i, (name, points) in enumerate(curves) if points and (drawn := _drawn(points))}
    if not lines:
        return Markup("")
    xs = [x for _, points in lines.values() for x, _ in points]
    ys = [y for _, points in lines.values() for _, y in points]
    x_axis, y_axis = _axis(xs, LEFT, WIDTH - RIGHT), _y_axis(ys)
    drawn = [_curve(name, points, i, x_axis, y_axis) for i, (name, points) in lines.items()]
    note = " (logarithmic)" if y_axis.is_log else ""
    svg = tag(
        "svg", _grid(x_axis, y_axis), *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label=title, class_="chart",
    )  # fmt: skip
    legend = _legend({i: name for i, (name, _) in lines.items()}) if has_legend or len(lines) > 1 else ""
    return tag("figure", tag("figcaption", title + note), svg, legend)


def stacked_bars(rows: Sequence[tuple[str, Sequence[float]]], colours: Sequence[str]) -> Markup:
    """Draw a bar for each row, divided as its values are; each row is drawn over the whole width."""
    bars = []
    for name, values in rows:
        total = sum(values) or 1.0
        shares = [(100 * value / total, colour) for value, colour in zip(values, colours, strict=True) if value > 0]
        parts = [tag("span", style=f"width:{share:.3f}%;background:{colour}") for share, colour in shares]
        bars.append(tag("div", tag("span", name, class_="name"), tag("div", *parts, class_="parts"), class_="bar"))
    return tag("div", *bars, class_="bars")


def _legend(names: Mapping[int, str]) -> Markup:
    keys = [tag("li", tag("span", class_=f"key k{_colour(i)}"), name) for i, name in names.items()]
    return tag("ul", *keys, class_="legend")


def _colour(number: int) -> int:
    return number % NUM_COLOURS


def _curve(name: str, points: Points, number: int, x_axis: Axis, y_axis: Axis) -> Markup:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = " dashed" if number // NUM_COLOURS % 2 else ""
    parts = [tag("polyline", points=path, class_=f"line l{_colour(number)}{dashed}")]
    if len(points) <= MAX_MARKED_POINTS:
        for (x, y), (step, value) in zip(places, points, strict=True):
            says = tag("title", f"{name}, {step:,.0f}: {value:.5g}")
            parts.append(tag("circle", says, cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.5, class_=f"dot d{_colour(number)}"))
    return tag("g", tag("title", name), *parts)


def _grid(x_axis: Axis, y_axis: Axis) -> Markup:
    parts = []
    for value in y_axis.ticks:
        y = f"{y_axis.place(value):.1f}"
        parts += [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"),
            tag("text", _tick(value), x=LEFT - 6, y=y, class_="tick y"),
        ]
    for value in x_axis.ticks:
        x = f"{x_axis.place(value):.1f}"
        parts += [tag("text", _tick(value), x=x, y=HEIGHT - BOTTOM + 16, class_="tick x")]
    parts += [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis")]
    parts += [tag("text", "steps done", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, class_="tick x")]
    return joined(parts)


def _y_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_FROM:
        return _log_axis(low, high)
    return _axis(values, HEIGHT - BOTTOM, TOP, least_ticks=4)


def _axis(values: Sequence[float], start: float, end: float, *, least_ticks: int = 5) -> Axis:
    """Make a linear axis around the values; the ends of the vertical one are ticks."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # one value
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    step = _nice((high - low) / least_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [step * i for i in range(first, last + 1)]
    if start < end:  # from left to right the data fills the width
        return Axis(low, high, start, end, [tick for tick in ticks if low <= tick <= high])
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def _log_axis(low: float, high: float) -> Axis:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = max(1, math.ceil((last - first) / 6))
    ticks = [10.0**power for power in range(first, last + 1, every)]
    return Axis(10.0**first, 10.0**last, HEIGHT - BOTTOM, TOP, ticks, is_log=True)


def _nice(least: float) -> float:
    """Return 1, 2 or 5 times a power of ten, the nearest that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15 or size < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    for least, mark in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= least:
            return f"{value / least if mark != 'k' else value / 1e3:.4g}{mark}"
    return f"{value:.6g}"


def _thinned(points: Points) -> Points:
    every = math.ceil(len(points) / MAX_POINTS)
    kept = list(points[::every])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
