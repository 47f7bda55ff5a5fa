"""The law of an overhead, fitted to measured points, and its tables and picture; for bench_overhead.py."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

MODES = ("train", "infer")
QUANTITIES = {"seconds": (1e3, "ms"), "bytes": (1 / 2**20, "MiB"), "flops": (1e-9, "GFLOP")}  # as shown

Point = dict[str, Any]


def fit(points: list[Point], values: list[float]) -> dict[str, Any]:
    """Least squares of a + b * megapixels + c * classes, leaving out what was not varied."""
    columns = {"a": [1.0] * len(points), "b": [p["megapixels"] for p in points], "c": [p["classes"] for p in points]}
    columns = {name: column for name, column in columns.items() if name == "a" or len(set(column)) > 1}
    matrix, target = np.array(list(columns.values())).T, np.array(values, dtype=float)
    solution = np.linalg.lstsq(matrix, target, rcond=None)[0]
    residual, spread = target - matrix @ solution, target - target.mean()
    variance = residual @ residual / max(1, len(target) - len(solution))
    errors = np.sqrt(variance * np.diag(np.linalg.pinv(matrix.T @ matrix)))
    law = {name: {"value": float(x), "error": float(e)} for name, x, e in zip(columns, solution, errors, strict=True)}
    total = spread @ spread
    return {**law, "r2": float(1 - residual @ residual / total) if total > 0 else 1.0}


def laws_of(points: list[Point]) -> dict[str, Any]:
    laws: dict[str, Any] = {}
    for mode in MODES:
        own = [point for point in points if point["mode"] == mode]
        for name in QUANTITIES:
            laws.setdefault(mode, {})[name] = {
                "overhead": fit(own, [point["overhead"][name] for point in own]),
                "relative": fit(own, [point["relative"][name] for point in own]),
                "relative_median": statistics.median(point["relative"][name] for point in own),
            }
    return laws


def points_table(points: list[Point]) -> Table:
    title = "With the inter-coder connection, and how much more than without it"
    table = Table("", "side", "classes", title=title)
    for _, unit in QUANTITIES.values():
        table.add_column(unit, justify="right")
        table.add_column("more", justify="right")
    for point in sorted(points, key=lambda point: MODES.index(point["mode"])):
        cells = [
            cell
            for name, (scale, _) in QUANTITIES.items()
            for cell in (f"{scale * point['with'][name]:.3g}", f"{100 * point['relative'][name]:.1f}%")
        ]
        table.add_row(point["mode"], f"{point['size']}", f"{point['classes']}", *cells)
    return table


def laws_table(laws: dict[str, Any]) -> Table:
    title = "Overhead = a + b * megapixels + c * classes, with standard errors"
    table = Table("", "", "a", "b", "c", "R2", "relative", title=title)
    for mode in MODES:
        for name, (scale, unit) in QUANTITIES.items():
            law = laws[mode][name]["overhead"]
            cells = [_with_error(law[term], scale) if term in law else "-" for term in "abc"]
            relative = f"{100 * laws[mode][name]['relative_median']:.1f}%"
            table.add_row(mode, unit, *cells, f"{law['r2']:.3f}", relative)
    return table


def _with_error(term: dict[str, float], scale: float) -> str:
    value, error = (round(scale * term[key], 6) + 0.0 for key in ("value", "error"))
    return f"{value:.3g} ± {error:.1g}" if error else f"{value:.3g}"


def draw(points: list[Point], laws: dict[str, Any], path: Path) -> None:
    """The overhead of each quantity over the pixels, measured and fitted; a column each, a row for each mode."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for row, mode in zip(figure.subplots(2, 3, sharex="row"), MODES, strict=True):
        own = [point for point in points if point["mode"] == mode]
        for axes, (name, (scale, unit)) in zip(row, QUANTITIES.items(), strict=True):
            law = {term: fitted["value"] for term, fitted in laws[mode][name]["overhead"].items() if term != "r2"}
            for i, count_ in enumerate(sorted({point["classes"] for point in own})):
                of_count = [point for point in own if point["classes"] == count_]
                x = np.array([point["megapixels"] for point in of_count])
                y = law["a"] + law.get("b", 0) * x + law.get("c", 0) * count_
                axes.plot(x, scale * y, color=f"C{i}", linewidth=1)
                measured = [scale * point["overhead"][name] for point in of_count]
                axes.plot(x, measured, "o", color=f"C{i}", label=f"{count_} classes")
            share = 100 * laws[mode][name]["relative_median"]
            axes.set(title=f"{mode}: {share:+.1f} % {name}", xlabel="megapixels a pass", ylabel=f"overhead, {unit}")
        row[0].legend()
    figure.savefig(path, dpi=120)
