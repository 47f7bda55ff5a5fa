"""Signs of failure in a run's figures, each told once a stage, in one line with a remedy.

They are the paper's (blurred boundaries; a discriminator that is too strong, or blind; student and teacher apart) and
that of self-training: classes that vanish from the pseudo-labels. They are a function of what was logged, so a run that
was interrupted tells the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from iccld.config import Config, stage_settings
from iccld.diagnostics import BLUR_STRIDE, YARDSTICK, Diagnosis, Figure
from iccld.programs.run.event_times import read_events
from iccld.runtime.measure.telemetry import write_event
from iccld.stages import diagnostics
from iccld.stages.signs import Sign, mean_of
from iccld.stages.table import STAGES

NUM_LINES = 3
"""The last logged lines that a sign is looked for in, together: one line may hold few samples."""
TOO_FAR_APART = 0.25
"""Share of the validation images' pixels that student and teacher give different classes; sound runs have 0.02 to 0.2
(the more, the shorter they are)."""
VIEWS_APART = 0.6
"""Such a share in training: the teacher sees a target image, and the student the mix that is made of it, augmented,
with half of it pasted over. That alone sets them apart, by 0.4 in a short run that is sound."""


def signs_of_training(entries: Sequence[Mapping[str, Any]], config: Config, stage: str) -> list[Sign]:
    """Find signs in the last `NUM_LINES` logged lines of a stage; none if there are fewer lines."""
    lines = [entry for entry in entries if entry["stage"] == stage and "loss" in entry]
    recent = lines[-NUM_LINES:]
    if len(recent) < NUM_LINES:
        return []
    found = STAGES[stage].signs(recent, stage_settings(stage, config))
    share = mean_of(recent, diagnostics.DISAGREEMENT)
    found += _of_disagreement(share, "of target images", most=VIEWS_APART)
    return found + _of_classes(recent, config, stage)


def signs_of_diagnosis(diagnosis: Diagnosis) -> list[Sign]:
    """Find signs in what a model shows on validation images."""
    figures = diagnosis.figures
    found = _of_blur(figures["denoised" if "denoised" in figures else "stage1"], figures[YARDSTICK])
    if "student" in figures:
        found += _of_disagreement(figures["student"].changed / 100, "of validation images", most=TOO_FAR_APART)
    return found


def tell(signs: Iterable[Sign], *, run_dir: Path | None, stage: str) -> None:
    """Print each sign, and note it in the run's events.jsonl; what the stage has told before is not told again.

    Without a run nothing is noted. Call on one rank.
    """
    noted = read_events(run_dir)[0] if run_dir and (run_dir / "events.jsonl").is_file() else []
    told = {event.get("sign") for event in noted if event["event"] == "warning" and event.get("stage") == stage}
    for sign in signs:
        if sign.name in told:
            continue
        told.add(sign.name)
        print(f"warning: {stage}: {sign.words}", flush=True)
        if run_dir:
            write_event(run_dir, "warning", stage=stage, sign=sign.name, words=sign.words)


def _of_disagreement(share: float | None, where: str, *, most: float) -> list[Sign]:
    if share is None or share <= most:
        return []
    words = (
        f"student and teacher differ in {share:.0%} of the pixels {where}: the teacher lags behind, or the student "
        f"does not settle; try a lower learning rate, more steps, or a lower teacher_decay."
    )
    return [Sign("apart", words)]


def _of_classes(recent: Sequence[Mapping[str, Any]], config: Config, stage: str) -> list[Sign]:
    """Find classes that are missing from all of the lines."""
    lost = set.intersection(*(set(entry.get(f"{diagnostics.CLASSES}/lost", ())) for entry in recent))
    if not lost:
        return []
    names = config.data.class_set.build().names
    remedies = [] if config.data.rare_class_sampling else ["data.rare_class_sampling=true"]
    remedies += STAGES[stage].class_remedies(stage_settings(stage, config))
    words = (
        f"the pseudo-labels have lost {', '.join(names[i] for i in sorted(lost))}, which the source's labels show; "
        f"unless the target has none, try {', or '.join(remedies)}."
    )
    return [Sign("lost_classes", words)]


def _of_blur(own: Figure, coarse: Figure) -> list[Sign]:
    if not own.boundary_miou * coarse.miou < coarse.boundary_miou * own.miou:
        return []
    words = (
        f"boundaries are blurred: boundary IoU {own.boundary_miou:.1f} of IoU {own.miou:.1f} is a smaller part than of "
        f"the labels seen at stride {BLUR_STRIDE} ({coarse.boundary_miou:.1f} of {coarse.miou:.1f}); try "
        f"model.decoder.inter_coder=true, larger images, or more steps."
    )
    return [Sign("blurred", words)]
