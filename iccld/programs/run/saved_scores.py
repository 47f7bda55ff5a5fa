"""Reading of the scores of a run's `report/`, without torch; the files may be a stranger's, and are checked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iccld.programs.run.metric_lines import number
from iccld.reading import MIB, read_json

OWN_RESULTS = ("results.json", "results_student.json", "results_best.json")
"""The run's own models by its own settings; the first that is there counts."""
MAX_CLASSES = 255
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

    @property
    def last(self) -> tuple[str, SavedScores] | None:
        """The score of the last stage, with the first number of steps that denoise if it denoises."""
        own = [label for label in self.scores if re.fullmatch(r"\S+( x[1-9]\d*)?", label)]  # controls: more words
        stages = [label.partition(" ")[0] for label in own]
        return (label := own[stages.index(stages[-1])], self.scores[label]) if own else None


NOTHING = SavedResults({}, {}, {})


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
    scores = {label: saved for label, values in _labelled(found) if (saved := _scores(values)) is not None}
    about = found.get("about")
    return SavedResults(scores, _diagnostics(found.get("diagnostics")), about if isinstance(about, dict) else {})


def _labelled(results: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Label the evaluations as tables do: `stage1`, `stage2 x1`, `mean latent`."""
    found: list[tuple[str, Any]] = []
    for name, values in results.items():
        if name in ("about", "diagnostics") or not isinstance(values, dict):
            continue
        label = name.removeprefix("stage2_").replace("_", " ")
        parts = {label: values} if "miou" in values else {f"{label} x{steps}": part for steps, part in values.items()}
        found += parts.items()
    return found


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
