"""Report of a grid: summary.json, report.md and its pictures.

No mean stands there without its spread, and no run is called better or worse than the baseline within two standard
errors of the paired difference.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from iccld.durable import make_folder, write_whole
from iccld.programs.ablate.drawing import draw_classes
from iccld.programs.ablate.paired import Estimate, estimate, judgement, paired_difference
from iccld.programs.ablate.pictures import write_pictures
from iccld.programs.ablate.rows import Ablation
from iccld.programs.ablate.summary import RowFigures, figures_of, to_json
from iccld.programs.ablate.tasks import tasks_of
from iccld.stages.table import first_stage

SUMMARY, REPORT = "summary.json", "report.md"
HOW_TO_READ = """\
Scores are mIoU in per cent on the validation set, of the last checkpoint; ± is one standard error over the training
seeds. A difference is to the baseline, seed by seed. It is called better or worse if it is at least two of its own
standard errors, over at least two seeds; otherwise no difference is shown. Runs that are alike are called so by chance
in 30 % of comparisons with two seeds, in 18 % with three, in 12 % with five. Minutes are those of the run's own
training and do not include the stage 1 that it took from another run; memory is the most that one rank held."""
WHICH_IMAGES = "They are the baseline's best, median and worst validation image by mIoU, the same for every run."

WHICH_LATENTS = """\
They are of a few validation images, and to be compared with one another alone. Each is D's map with the image's own
features, under another latent: E's (stage1), the true z_0 (own), the mean, another image's, E's after gradient steps on
the true labels (fitted, an upper bound), one denoising step from noise (denoised), and the z_0 that is predicted from
the true z_t (z_0_at_t). The student is another set of weights; labels_at_16 is no model, but labels in cells of 16."""


def write_report(ablation: Ablation, *, pictures: bool) -> None:
    """Write everything from what is finished, and say where."""
    rows = figures_of(ablation)
    make_folder(ablation.folder, within=ablation.folder)
    write_whole(ablation.folder / SUMMARY, json.dumps(to_json(ablation, rows), indent=1) + "\n")
    classes = {name: row.classes for name, row in rows.items()}
    charts = draw_classes(classes, ablation.grid.baseline, folder=ablation.folder)
    chosen, samples = write_pictures(ablation, rows) if pictures else ({}, [])
    text = markdown(ablation, rows, charts=charts, chosen=chosen, samples=samples)
    write_whole(ablation.folder / REPORT, text)
    for old in {*ablation.folder.glob("classes_*.png"), *ablation.folder.glob("pictures_*.png")}:
        if old.name not in (*charts, *samples):
            old.unlink()
    print(f"written to {ablation.folder / REPORT} and {ablation.folder / SUMMARY}", flush=True)


def markdown(
    ablation: Ablation,
    rows: Mapping[str, RowFigures],
    *,
    charts: Sequence[str] = (),
    chosen: Mapping[str, str] | None = None,
    samples: Sequence[str] = (),
) -> str:
    """Write the text of report.md."""
    grid = ablation.grid
    lines = [f"# {ablation.folder.resolve().name}", ""]
    lines += [
        f"Baseline `{grid.baseline}`, seeds {', '.join(map(str, grid.seeds))}.",
        HOW_TO_READ,
        "",
        *_overview(ablation, rows),
        "",
        *_missing(rows),
        *_second_stages(ablation, rows),
    ]
    lines += [*_diagnostics(rows), "## Classes", "", *_classes(rows), ""]
    lines += [line for name in charts for line in (f"![IoU of each class]({name})", "")]
    if samples and chosen:
        keys = "; ".join(f"{rank} {key}" for rank, key in chosen.items())
        lines += ["## Sample pictures", "", f"From top to bottom: {keys}.", WHICH_IMAGES, ""]
        lines += [line for name in samples for line in (f"![sample pictures]({name})", "")]
    lines += ["## Commands", "", *_commands(ablation), ""]
    commits = list(dict.fromkeys(commit for row in rows.values() for commit in row.commits))
    return "\n".join([*lines, f"Commit: {'; '.join(commits) or 'no run is finished'}.", ""])


def _overview(ablation: Ablation, rows: Mapping[str, RowFigures]) -> Iterator[str]:
    baseline = rows[ablation.grid.baseline]
    yield from _head("run", "scored", "mIoU", "difference", "", "boundary mIoU", "minutes", "GiB")
    for name, row in rows.items():
        difference = paired_difference(row.mious(), baseline.mious())
        is_baseline = name == baseline.name
        verdict = "baseline" if is_baseline else judgement(difference) if row.runs else "not finished"
        cells = [f"`{name}`", row.scored, _words(row.miou)]
        cells += ["" if is_baseline else _words(difference, signed=True), verdict, _words(row.boundary)]
        cells += [_words(row.minutes, digits=1), "-" if row.peak_gib is None else f"{row.peak_gib:.2f}"]
        yield _line(cells)
    about = [(name, row.about) for name, row in ablation.grid.rows.items() if row.about]
    yield from ["", *(f"- `{name}`: {text}" for name, text in about)] if about else []


def _missing(rows: Mapping[str, RowFigures]) -> Iterator[str]:
    lacking = [f"`{row.name}` (seed {', '.join(map(str, row.missing))})" for row in rows.values() if row.missing]
    if lacking:
        yield from (f"Not finished, and not in the figures: {', '.join(lacking)}.", "")


def _second_stages(ablation: Ablation, rows: Mapping[str, RowFigures]) -> Iterator[str]:
    """Yield what stage 2 adds to the row's own stage 1, and every number of denoising steps."""
    shown = [row for row in rows.values() if row.has_later_stage and row.runs]
    if not shown:
        return
    yield from ("## Stage 2 beside its own stage 1", "")
    yield "The first line of a run is what it is scored by above, whichever number of denoising steps is best."
    yield ""
    yield from _head("run", "scored", "mIoU", "to its own stage 1", "", "to the baseline", "")
    baseline = rows[ablation.grid.baseline].mious()
    for row in shown:
        own = row.mious(first_stage())
        for scored in [row.scored, *row.others]:
            mious = row.mious(scored)
            gain = paired_difference(mious, own) if scored != first_stage() else None
            difference = paired_difference(mious, baseline)
            cells = [f"`{row.name}`", scored, _words(estimate(list(mious.values()))), _words(gain, signed=True)]
            cells += [judgement(gain) if gain else "", _words(difference, signed=True), judgement(difference)]
            yield _line(cells)
    yield ""


def _diagnostics(rows: Mapping[str, RowFigures]) -> Iterator[str]:
    """Yield the mIoU of each run's last stage under other latents, where it was measured."""
    shown = [row for row in rows.values() if row.diagnostics]
    if not shown:
        return
    yield from ("## Diagnostics", "", WHICH_LATENTS, "")
    yield from _head("mIoU, %", *(f"`{row.name}`, {_seeds(len(row.runs))}" for row in shown))
    for name in dict.fromkeys(name for row in shown for name in row.diagnostics):
        yield _line([name, *(_words(row.diagnostics.get(name), usual_n=len(row.runs)) for row in shown)])
    yield ""


def _classes(rows: Mapping[str, RowFigures]) -> Iterator[str]:
    shown = [row for row in rows.values() if row.runs]
    names = list(dict.fromkeys(name for row in shown for name in row.classes))
    yield from _head("IoU, %", *(f"`{row.name}`, {_seeds(len(row.runs))}" for row in shown))
    for name in names:
        yield _line([name, *(_words(row.classes.get(name), usual_n=len(row.runs)) for row in shown)])


def _commands(ablation: Ablation) -> Iterator[str]:
    """Yield the grid's command, then those of its runs, in the order in which they are begun."""
    yield from ("```", ablation.command, "", *map(ablation.shown, tasks_of(ablation.grid)), "```")


def _seeds(n: int) -> str:
    return f"{n} seeds" if n > 1 else "1 seed, spread unknown"


def _words(value: Estimate | None, *, digits: int = 2, signed: bool = False, usual_n: int = 0) -> str:
    return value.words(digits=digits, signed=signed, usual_n=usual_n) if value else "-"


def _head(*cells: str) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
