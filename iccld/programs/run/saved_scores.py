"""Reading of the scores of a run's `report/`, without torch; the files may be a stranger's, and are checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from iccld.programs.run.metric_lines import number
from iccld.reading import MIB, read_json

OWN_RESULTS = ("results.json", "results_student.json", "results_best.json")
"""The run's own models by its own settings; the first that is there counts."""
NO_SCORES = ("about", "diagnostics")
"""Parts of a file of results that are no scores."""
MAX_CLASSES = 255
MAX_RESULTS = 1000
"""The most parts of a file of results: each name is compared with every other."""
MEANS = {
    "miou": "mIoU",
    "boundary_miou": "boundary mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
}


@dataclass(frozen=True)
class SavedScores:
    """One evaluation, in per cent. `means` by `MEANS`, `iou` by class; None if there was nothing to count."""

    means: Mapping[str, float | None]
    iou: Mapping[str, float | None]
    num_images: int


@dataclass(frozen=True)
class SavedResults:
    """A run's own results: scores by name (`stage1`, `stage2 x1`, ...), and diagnostics by stage."""

    scores: Mapping[str, SavedScores]
    diagnostics: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    about: Mapping[str, Any]
    of_stages: Mapping[str, str]
    """The stage of each score, as far as it is no control's, and has at least one step where there are steps."""

    @property
    def scored_set(self) -> str:
        """Return the shards of the set that was scored; "" where the results do not tell."""
        data = self.about.get("data")
        return str(data.get("shards", "")) if isinstance(data, dict) else ""

    @property
    def last(self) -> tuple[str, SavedScores] | None:
        """The score of the last stage, with the first number of steps that denoise if it denoises."""
        stages = [*self.of_stages.values()]
        return (label := [*self.of_stages][stages.index(stages[-1])], self.scores[label]) if stages else None


NOTHING = SavedResults({}, {}, {}, {})


def of_own_models(run_dir: Path) -> list[Path]:
    """The files, as far as they are there, with scores of the run's own models."""
    return [path for name in OWN_RESULTS if (path := run_dir / "report" / name).is_file()]


def read_own(run_dir: Path) -> SavedResults:
    """The run's own results; `NOTHING` where it has none. Raises ValueError, OSError where they cannot be read."""
    path = next(iter(of_own_models(run_dir)), None)
    if path is None:
        return NOTHING
    found = read_json(path, 64 * MIB)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no scores.")
    scored = [(each, saved) for each in evaluations(found) if (saved := _scores(each.scores))]
    about = found.get("about")
    return SavedResults(
        {each.label: saved for each, saved in scored},
        _diagnostics(found.get("diagnostics")),
        about if isinstance(about, dict) else {},
        {each.label: each.stage for each, _ in scored if not each.control and each.steps != "0"},
    )


class Evaluation(NamedTuple):
    """Evaluation in a `results.json`: `scores` of a stage, or of its `control` (`mean_latent`), with so many `steps`.

    `control` and `steps` may be empty. `label` is what tables show: `stage1`, `stage2 x1`, `mean latent`.
    """

    label: str
    stage: str
    control: str
    steps: str
    scores: Any


def evaluations(results: Mapping[str, Any]) -> Iterator[Evaluation]:
    """Yield each evaluation. A control is named after its stage (`stage2_mean_latent`). Raises ValueError."""
    if len(results) > MAX_RESULTS:
        raise ValueError(f"results.json has {len(results):,} parts, and at most {MAX_RESULTS:,} are read; score again.")
    named = {name: part for name, part in results.items() if isinstance(part, dict) and name not in NO_SCORES}
    controls: set[str] = set()
    for name, scores in named.items():
        stage = next((other for other in named if name.startswith(f"{other}_")), name)
        control = name.removeprefix(stage).removeprefix("_")
        label = (name if control in controls else control).replace("_", " ") if control else name
        controls.add(control)
        if "miou" in scores:
            yield Evaluation(label, stage, control, "", scores)
        else:
            yield from (Evaluation(f"{label} x{steps}", stage, control, steps, of) for steps, of in scores.items())


def _scores(values: Any) -> SavedScores | None:
    match values:
        case {"names": list(names), "iou": list(iou)} if len(names) == len(iou) <= MAX_CLASSES:
            classes = {str(name): number(value) for name, value in zip(names, iou, strict=True)}
            return SavedScores(
                {name: number(values.get(name)) for name in MEANS}, classes, int(number(values.get("num_images")) or 0)
            )
    return None


def _diagnostics(values: Any) -> dict[str, dict[str, dict[str, float | None]]]:
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for stage, figures in values.items() if isinstance(values, dict) else ():
        rows = figures.items() if isinstance(figures, dict) else ()
        found[stage] = {
            latent: {name: number(value) for name, value in figure.items()}
            for latent, figure in rows
            if isinstance(figure, dict)
        }
    return found
