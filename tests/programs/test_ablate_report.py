"""The report of a grid on figures made up: what it must never print, and which charts it draws."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.programs.ablate.drawing import MAX_RUNS, charts, draw_classes
from iccld.programs.ablate.grid import Grid, Row
from iccld.programs.ablate.paired import Estimate, estimate, judgement, paired_difference
from iccld.programs.ablate.report import markdown
from iccld.programs.ablate.rows import Ablation
from iccld.programs.ablate.summary import RowFigures, Run, _peak_gib, to_json
from iccld.scores import EvaluationResult

A_MEAN = re.compile(r"[+-]?\d+\.\d+")


def result(miou: float, *, rider: float = 1.0) -> EvaluationResult:
    names, iou = ["road", "rider"], [miou, rider]
    return EvaluationResult(names, iou, iou, miou, miou / 2, 50.0, 50.0, num_images=5)


def run(results: dict[str, EvaluationResult], *, minutes: float = 1.0, commit: str = "abc") -> Run:
    diagnostics = {"num_images": 8, **{name: {"miou": of.miou} for name, of in results.items()}}
    return Run(results, [], minutes, 0.5, [commit], diagnostics)


@st.composite
def figures(draw: st.DrawFn) -> tuple[Ablation, dict[str, RowFigures]]:
    names = draw(st.lists(st.sampled_from(["a", "b", "c", "d|e"]), min_size=1, max_size=4, unique=True))
    seeds = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    rows, miou = {}, st.floats(0, 100)
    for name in names:
        scored = draw(st.sampled_from(["stage1", "stage2 x1"]))
        row = rows[name] = RowFigures(name, scored)
        for seed in seeds:
            if draw(st.booleans()):
                rider = draw(st.one_of(miou, st.just(math.nan)))
                results = {key: result(draw(miou), rider=rider) for key in dict.fromkeys(["stage1", scored])}
                row.runs[seed] = run(results)
            else:
                row.missing.append(seed)
    grid = Grid(names[0], tuple(seeds), {name: Row(name, ("model=tiny",), about=f"about {name}") for name in names})
    return Ablation(grid, Path("runs/some"), 1, {}), rows


@settings(deadline=None)
@given(figures())
def test_no_mean_without_its_spread_and_no_better_within_two_errors(made: tuple[Ablation, dict[str, RowFigures]]):
    ablation, rows = made
    lines = markdown(ablation, rows).splitlines()
    tables = [line for line in lines if line.startswith("| ") and not line.startswith("|---")]
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in tables}) <= 4, "of a table, all rows have as many cells"
    for line in tables:
        for cell in re.split(r"(?<!\\)\|", line)[2:]:
            is_memory = cell.strip() == "0.50"
            assert not A_MEAN.match(cell.strip()) or is_memory or "±" in cell or "spread unknown" in cell, line
    baseline = rows[ablation.grid.baseline].mious()
    for name, row in rows.items():
        shown = name.replace("|", r"\|")
        line = next(line for line in tables if line.startswith(f"| `{shown}` |"))
        words = [word for word in ("better", "worse", "no difference shown") if word in line]
        if name == ablation.grid.baseline or not row.runs:
            assert not words
            continue
        difference = paired_difference(row.mious(), baseline)
        assert words == [judgement(difference)]
        shared = sorted(row.mious().keys() & baseline.keys())
        if len(shared) < 2:
            assert words == ["no difference shown"]
        assert all(f"seed_{seed}" in "\n".join(lines) for seed in ablation.grid.seeds)


@settings(deadline=None)
@given(figures())
def test_the_summary_is_json_with_the_names_and_without_nan(made: tuple[Ablation, dict[str, RowFigures]]):
    ablation, rows = made
    summary = json.loads(json.dumps(to_json(ablation, rows), allow_nan=False))
    assert list(summary) == list(rows)
    for name, row in summary.items():
        assert {"miou_mean", "miou_std", "seeds", "paired_difference", "paired_se", "minutes"} <= row.keys()
        assert sorted([*row["seeds"], *row["missing_seeds"]]) == sorted(ablation.grid.seeds)
        assert (row["miou_std"] is None) == (len(row["seeds"]) < 2)
        assert row["paired_seeds"] == len(set(row["seeds"]) & set(summary[ablation.grid.baseline]["seeds"]))
        assert ("gain_over_own_stage1" in row) == (rows[name].scored != "stage1")


def test_diagnostics_are_means_over_the_runs_that_have_them():
    without = Run({"stage1": result(9.0)}, [], 1.0, None, [])  # of an earlier version
    row = RowFigures("a", "stage1", {0: run({"stage1": result(4.0)}), 1: run({"stage1": result(6.0)}), 2: without})
    assert row.diagnostics == {"stage1": estimate([4.0, 6.0])}
    assert RowFigures("b", "stage1", {0: without}).diagnostics == {}


def test_a_class_that_a_seed_has_not_counts_in_the_others_alone():
    row = RowFigures("a", "stage1", {0: run({"stage1": result(4.0)}), 1: run({"stage1": result(6.0, rider=math.nan)})})
    assert row.classes["road"] == estimate([4.0, 6.0]) and row.classes["rider"] == Estimate(1.0, None, None, 1)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 29))
def test_every_row_with_scores_is_in_one_chart_and_the_baseline_in_all(scored: list[bool], baseline: int):
    classes = {"road": Estimate(1.0, None, None, 1)}
    rows = {f"r{i}": classes if has else {} for i, has in enumerate(scored)}
    name = f"r{baseline % len(scored)}"
    drawn = list(charts(rows, name))
    assert all(0 < len(chart) <= MAX_RUNS and (not rows[name] or next(iter(chart)) == name) for chart in drawn)
    others = [row for chart in drawn for row in chart if row != name]
    assert others == [row for row, found in rows.items() if found and row != name]


@pytest.mark.parametrize("n", [1, 3])
def test_charts_are_written_with_one_seed_too(tmp_path: Path, n: int):
    value = Estimate(30.0, 2.0, 1.0, n) if n > 1 else Estimate(30.0, None, None, 1)
    rows = {f"run {i} $x^2$": {"road": value, "a_b $": value} for i in range(8)} | {"none": {}}
    names = draw_classes(rows, "run 3 $x^2$", folder=tmp_path)
    assert names == ["classes_1.png", "classes_2.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_scores_with_nothing_to_count_are_left_out_and_null():
    """Images of one class have no boundary; images without a label have no score at all."""
    plain, empty = result(4.0), replace(result(math.nan), boundary_miou=math.nan)
    runs = {
        0: run({"stage1": replace(plain, boundary_miou=math.nan)}),
        1: run({"stage1": plain}),
        2: run({"stage1": empty}),
    }
    runs = {seed: replace(each, diagnostics={}) for seed, each in runs.items()}
    rows = {"a": RowFigures("a", "stage1", runs)}
    ablation = Ablation(Grid("a", (0, 1, 2), {"a": Row("a", ())}), Path("some"), 1, {})
    summary = json.loads(json.dumps(to_json(ablation, rows), allow_nan=False))["a"]
    assert rows["a"].miou == estimate([4.0, 4.0]) and rows["a"].boundary == estimate([2.0])
    assert [summary["by_seed"][seed]["miou"] for seed in "012"] == [4.0, 4.0, None]
    assert [summary["by_seed"][seed]["boundary_miou"] for seed in "012"] == [None, 2.0, None]
    assert "(2 seeds)" in markdown(ablation, rows)


def test_the_memory_of_a_run_is_known_also_beside_lines_that_are_torn_or_no_entries(tmp_path: Path):
    assert _peak_gib(tmp_path) is None
    lines = [{"stage": "stage1", "step": step, "peak_gib": peak} for step, peak in ((1, 0.5), (2, 2.5), (3, "9"))]
    text = "\n".join(map(json.dumps, [*lines, [1], "no entry", None]))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"stage": "stage1", "st')
    assert _peak_gib(tmp_path) == 2.5
