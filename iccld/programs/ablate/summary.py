"""Figures of a grid: each row's mean over its seeds with its spread, and the paired difference to the baseline.

A row's score is that of its last stage, whatever scored best: of stage 2 with the first of `inference.num_steps` that
denoises.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iccld.config import Config
from iccld.programs.ablate.paired import Estimate, estimate, judgement, paired_difference
from iccld.programs.ablate.rows import Ablation, has_finished, read_note
from iccld.programs.ablate.tasks import Task
from iccld.programs.evaluate.evaluate import named_results
from iccld.programs.evaluate.results import own_results, read_results
from iccld.programs.run.event_times import read_events, straightened
from iccld.programs.run.ledger import attempts, total_of
from iccld.programs.run.metric_lines import number, read_entries
from iccld.scores import EvaluationResult
from iccld.stages.table import STAGES, first_stage


@dataclass(frozen=True)
class Run:
    """One finished run. `results` by name: `stage1`, `stage2 x1`, ..., `mean latent`.

    `diagnostics`: those of its last stage, as `evaluate` writes them; earlier versions wrote none.
    """

    results: Mapping[str, EvaluationResult]
    by_noise_seed: list[float]
    minutes: float
    peak_gib: float | None
    commits: list[str]
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class RowFigures:
    """Row with its finished runs by seed. `scored`: which of a run's results is the row's."""

    name: str
    scored: str
    runs: dict[int, Run] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)

    def mious(self, scored: str = "") -> dict[int, float]:
        """Return the mIoU by seed, of the seeds that have this result, and something to count in it."""
        name = scored or self.scored
        found = {seed: run.results[name].miou for seed, run in self.runs.items() if name in run.results}
        return {seed: miou for seed, miou in found.items() if not math.isnan(miou)}

    @property
    def miou(self) -> Estimate | None:
        return estimate(list(self.mious().values()))

    @property
    def boundary(self) -> Estimate | None:
        values = [run.results[self.scored].boundary_miou for run in self.runs.values()]
        return estimate([value for value in values if not math.isnan(value)])

    @property
    def minutes(self) -> Estimate | None:
        return estimate([run.minutes for run in self.runs.values()])

    @property
    def peak_gib(self) -> float | None:
        """Return the most GiB of any run."""
        return max((run.peak_gib for run in self.runs.values() if run.peak_gib is not None), default=None)

    @property
    def has_later_stage(self) -> bool:
        return self.scored != first_stage()

    @property
    def gain(self) -> Estimate | None:
        """Return the gain of the last stage over the row's own stage 1, paired by seed."""
        return paired_difference(self.mious(), self.mious(first_stage())) if self.has_later_stage else None

    @property
    def others(self) -> list[str]:
        """Return further scores, such as other numbers of denoising steps."""
        return [name for run in list(self.runs.values())[:1] for name in run.results if name != self.scored]

    @property
    def classes(self) -> dict[str, Estimate]:
        """Return the IoU by class; a class that a run neither has nor predicts counts in the other runs alone."""
        found: dict[str, list[float]] = {}
        for run in self.runs.values():
            result = run.results[self.scored]
            for name, iou in zip(result.names, result.iou, strict=True):
                found.setdefault(name, []).extend([] if math.isnan(iou) else [iou])
        return {name: value for name, ious in found.items() if (value := estimate(ious)) is not None}

    @property
    def diagnostics(self) -> dict[str, Estimate]:
        """Return the mIoU under each latent, on the images of the diagnostics."""
        found: dict[str, list[float]] = {}
        for run in self.runs.values():
            for name, figure in run.diagnostics.items():
                if isinstance(figure, Mapping) and figure["miou"] is not None:
                    found.setdefault(name, []).append(figure["miou"])
        return {name: value for name, mious in found.items() if (value := estimate(mious)) is not None}

    @property
    def commits(self) -> list[str]:
        return list(dict.fromkeys(commit for run in self.runs.values() for commit in run.commits))


def figures_of(ablation: Ablation) -> dict[str, RowFigures]:
    """Return the rows in the order of the grid, with what is finished of them."""
    rows: dict[str, RowFigures] = {}
    for name in ablation.grid.rows:
        row = rows[name] = RowFigures(name, scored_as(ablation.configs[name]))
        for seed in ablation.grid.seeds:
            task = Task(name, seed)
            try:
                if has_finished(ablation, task):
                    row.runs[seed] = _summarised(ablation, task)
            except (ValueError, OSError) as error:
                print(f"{task}: is not finished: {error}", flush=True)
            if seed not in row.runs:
                row.missing.append(seed)
    return rows


def scored_as(config: Config) -> str:
    """Name the result that is the row's."""
    return STAGES[config.stages[-1]].main_score(config.inference)


def _summarised(ablation: Ablation, task: Task) -> Run:
    run_dir, config = ablation.run_dir(task), ablation.config(task)
    saved, scored = read_results(own_results(config)), scored_as(config)
    try:
        results = named_results(saved)
    except (TypeError, AttributeError):  # fields are missing, or of another kind
        results = {}
    if scored not in results:
        raise ValueError(f"{own_results(config)} holds no {scored}; remove it, and the same command scores again.")
    stage, _, steps = scored.partition(" x")
    scores = saved[stage][steps] if steps else saved[stage]
    commits = [_commit(code) for code in read_note(run_dir)["code"]]
    by_noise_seed, diagnostics = scores.get("miou_by_noise_seed", []), saved.get("diagnostics", {}).get(stage, {})
    return Run(results, by_noise_seed, _minutes(run_dir), _peak_gib(run_dir), commits, diagnostics)


def _commit(code: Mapping[str, str]) -> str:
    return code["commit"] if code["changed"] == "nothing" else f"{code['commit']} with changes (code {code['code']})"


def _minutes(run_dir: Path) -> float:
    """Return the minutes of all attempts, without the final scores and the time between the attempts."""
    events, _ = straightened(read_events(run_dir)[0])
    total = total_of(attempts(events))
    return (sum(total.values()) - total["down"]) / 60


def _peak_gib(run_dir: Path) -> float | None:
    """Return the most GiB that a rank has held, as far as it was logged."""
    peaks = (number(entry.get("peak_gib")) for entry in read_entries(run_dir))
    return max((peak for peak in peaks if peak is not None), default=None)


def to_json(ablation: Ablation, rows: Mapping[str, RowFigures]) -> dict[str, Any]:
    """Return the content of summary.json, by the rows' names."""
    baseline = rows[ablation.grid.baseline]
    return {name: _row(ablation, row, baseline) for name, row in rows.items()}


def _row(ablation: Ablation, row: RowFigures, baseline: RowFigures) -> dict[str, Any]:
    of_grid, difference = ablation.grid.rows[row.name], paired_difference(row.mious(), baseline.mious())
    gain = _difference(row.gain) | {"judgement": judgement(row.gain)}
    return {
        "about": of_grid.about,
        "after": of_grid.after,
        "initial": of_grid.initial,
        "settings": list(of_grid.settings),
        "scored": row.scored,
        **_estimate("miou", row.miou),
        "seeds": sorted(row.runs),
        "missing_seeds": row.missing,
        **_difference(difference),
        "judgement": "baseline" if row.name == baseline.name else judgement(difference),
        **_estimate("boundary_miou", row.boundary),
        **_estimate("minutes", row.minutes),
        "minutes": row.minutes.mean if row.minutes else None,
        "peak_gib": row.peak_gib,
        "classes": {name: _estimate("iou", value) for name, value in row.classes.items()},
        "diagnostics": {name: _estimate("miou", value) for name, value in row.diagnostics.items()},
        "commit": "; ".join(row.commits),
        **({"gain_over_own_stage1": gain} if row.has_later_stage else {}),
        "scores": {name: _scores(row, name, baseline) for name in [row.scored, *row.others]} if row.runs else {},
        "by_seed": {str(seed): _by_seed(row, run) for seed, run in row.runs.items()},
    }


def _scores(row: RowFigures, scored: str, baseline: RowFigures) -> dict[str, Any]:
    mious = row.mious(scored)
    return _estimate("miou", estimate(list(mious.values()))) | _difference(paired_difference(mious, baseline.mious()))


def _by_seed(row: RowFigures, run: Run) -> dict[str, Any]:
    results = {name: result.to_json() for name, result in run.results.items()}
    return {
        "miou": results[row.scored]["miou"],
        "boundary_miou": results[row.scored]["boundary_miou"],
        "miou_by_noise_seed": run.by_noise_seed,
        "miou_of": {name: result["miou"] for name, result in results.items()},
        "minutes": run.minutes,
        "peak_gib": run.peak_gib,
        "commits": run.commits,
        "diagnostics": run.diagnostics,
    }


def _estimate(name: str, value: Estimate | None) -> dict[str, Any]:
    """Return mean, standard deviation and error; null is unknown: with one seed there is no spread."""
    parts = {"mean": value.mean, "std": value.std, "se": value.se} if value else dict.fromkeys(("mean", "std", "se"))
    return {f"{name}_{part}": number for part, number in parts.items()}


def _difference(value: Estimate | None) -> dict[str, Any]:
    return {
        "paired_difference": value.mean if value else None,
        "paired_se": value.se if value else None,
        "paired_seeds": value.n if value else 0,
    }
