"""Each sign of failure is told on one side of its threshold, not on the other, and once a stage."""

import json
from pathlib import Path
from typing import Any

import pytest

from iccld.config import Config
from iccld.diagnostics import YARDSTICK, Diagnosis, Figure
from iccld.programs.run.metric_lines import read_entries
from iccld.programs.run.signs import (
    NUM_LINES,
    TOO_FAR_APART,
    VIEWS_APART,
    signs_of_diagnosis,
    signs_of_training,
    tell,
)
from iccld.runtime.measure.telemetry import write_event
from iccld.stages.signs import BLIND_ABOVE_CHANCE, TOO_STRONG, Sign

RAMP = Config().stage2.objective.adversarial_ramp_steps
DOMAINS = ("source", "target", "mixed")


def lines(stage: str = "stage2", *, first: int = RAMP, count: int = NUM_LINES, **values: Any) -> list[dict[str, Any]]:
    return [{"format": 2, "stage": stage, "step": first + 50 * i, "loss": 1.0, **values} for i in range(count)]


def accuracy(value: float, domains: tuple[str, ...] = DOMAINS) -> dict[str, float]:
    return {f"accuracy/{domain}": value for domain in domains} | {"accuracy/t_bin_0": 0.0}


def names(entries: list[dict[str, Any]], stage: str = "stage2") -> list[str]:
    return [sign.name for sign in signs_of_training(entries, Config(), stage)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, ["strong_discriminator"]),
        (TOO_STRONG + 0.001, ["strong_discriminator"]),
        (TOO_STRONG - 0.001, []),
        (1 / 3 + BLIND_ABOVE_CHANCE + 0.001, []),
        (1 / 3 + BLIND_ABOVE_CHANCE - 0.001, ["blind_discriminator"]),
        (0.1, ["blind_discriminator"]),
    ],
)
def test_a_discriminator_that_is_too_strong_or_blind_is_told_of(value: float, expected: list[str]):
    assert names(lines(**accuracy(value))) == expected


def test_chance_is_that_of_the_domains_there_are():
    two = ("source", "target")
    assert names(lines(**accuracy(0.5, two))) == ["blind_discriminator"]
    assert names(lines(**accuracy(0.5))) == []


def test_a_discriminator_that_teaches_nothing_by_its_weight_is_not_told_of():
    config = Config()
    config.stage2.objective.adversarial_weight = 0.0
    assert not signs_of_training(lines(**accuracy(0.3)), config, "stage2")
    assert not signs_of_training(lines(**accuracy(1.0)), config, "stage2")


def test_a_domain_that_is_always_known_does_not_hide_those_that_are_not():
    mixed = {"accuracy/source": 1.0, "accuracy/target": 0.0, "accuracy/mixed": 0.1}
    assert names(lines(**mixed)) == ["blind_discriminator"]


def test_before_the_end_of_the_ramp_a_discriminator_may_be_blind_but_not_strong():
    early = RAMP - 1
    assert names(lines(first=early, **accuracy(0.3))) == []
    assert names(lines(first=early + 1, **accuracy(0.3))) == ["blind_discriminator"]
    assert names(lines(first=0, **accuracy(0.95))) == ["strong_discriminator"]


def test_a_sign_lasts_over_recent_lines_of_its_own_stage():
    strong, fair = accuracy(1.0), accuracy(0.6)
    assert names(lines(count=NUM_LINES - 1, **strong)) == []
    assert names([*lines(count=5, **strong), *lines(first=5000, **fair)]) == []
    assert names([*lines(count=5, **fair), *lines(first=5000, **strong)]) == ["strong_discriminator"]
    scores = [{"stage": "stage2", "step": 9000 + i, "miou": 1.0} for i in range(NUM_LINES)]
    others = lines("stage1", first=9000, **fair)
    assert names([*lines(**strong), *scores, *others]) == ["strong_discriminator"]


@pytest.mark.parametrize("more", [0.001, -0.001])
def test_student_and_teacher_apart_are_told_of(more: float):
    expected = ["apart"] if more > 0 else []
    assert names(lines("stage1", disagreement=VIEWS_APART + more), "stage1") == expected
    figures = {name: Figure(50.0, 25.0, 0.0) for name in ("stage1", YARDSTICK)}
    figures["student"] = Figure(50.0, 25.0, 100 * (TOO_FAR_APART + more))
    assert [sign.name for sign in signs_of_diagnosis(Diagnosis(figures, 8))] == expected


def test_classes_are_lost_that_all_recent_lines_lack_and_they_are_named():
    entries = lines("stage1", count=2, **{"pseudo_classes/lost": [11, 18]})
    entries += lines("stage1", first=2000, count=1, **{"pseudo_classes/lost": [5, 11]})
    (sign,) = signs_of_training(entries, Config(), "stage1")
    assert sign.name == "lost_classes" and "have lost person, which" in sign.words
    assert "stage1.objective.class_thresholds=0.95, or" in sign.words
    entries[-1]["pseudo_classes/lost"] = [5]
    assert not signs_of_training(entries, Config(), "stage1")
    del entries[-1]["pseudo_classes/lost"]
    assert not signs_of_training(entries, Config(), "stage1")


@pytest.mark.parametrize("own", ["stage1", "denoised"])
@pytest.mark.parametrize(("boundary", "expected"), [(11.9, ["blurred"]), (12.1, []), (float("nan"), [])])
def test_blur_is_a_smaller_part_of_boundaries_than_coarse_labels_keep(own: str, boundary: float, expected: list[str]):
    """The labels at stride 16 keep a quarter, 15 of 60: of 48 that is 12."""
    figures = {YARDSTICK: Figure(60.0, 15.0, 0.0), "stage1": Figure(48.0, 24.0, 0.0)}
    figures[own] = Figure(48.0, boundary, 0.0)
    assert [sign.name for sign in signs_of_diagnosis(Diagnosis(figures, 8))] == expected


def test_every_warning_is_one_line_that_says_what_to_try():
    found = signs_of_training(lines(**accuracy(1.0), disagreement=1.0), Config(), "stage2")
    found += signs_of_training(lines(**accuracy(0.3), **{"pseudo_classes/lost": [0]}), Config(), "stage2")
    figures = {YARDSTICK: Figure(60.0, 30.0, 0.0), "stage1": Figure(48.0, 10.0, 0.0)}
    found += signs_of_diagnosis(Diagnosis(figures, 8))
    assert "rare_class_sampling" not in found[2].words, "it is on"
    assert len({sign.name for sign in found}) == 5
    assert all("\n" not in sign.words and "try " in sign.words for sign in found)


def test_a_stage_tells_a_sign_once_also_after_a_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    blind, strong = Sign("blind", "it sees nothing; try this."), Sign("strong", "it sees all; try that.")
    write_event(tmp_path, "launched", since=0.0)
    for signs in ([blind, blind], [blind], [strong, blind]):
        tell(signs, run_dir=tmp_path, stage="stage2")
    tell([blind], run_dir=tmp_path, stage="stage1")
    assert capsys.readouterr().out.splitlines() == [
        "warning: stage2: it sees nothing; try this.",
        "warning: stage2: it sees all; try that.",
        "warning: stage1: it sees nothing; try this.",
    ]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    told = [(event["stage"], event["sign"]) for event in events if event["event"] == "warning"]
    assert told == [("stage2", "blind"), ("stage2", "strong"), ("stage1", "blind")]


def test_without_a_run_a_sign_is_told_and_noted_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tell([Sign("blind", "it sees nothing; try this.")], run_dir=None, stage="stage2")
    assert "stage2: it sees nothing" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_torn_line_is_no_entry(tmp_path: Path):
    text = '{"format": 2, "stage": "stage1", "step": 1}\n{"stage": "sta\n[1]\n'
    text += '{"step": 2}\n{"stage": "stage2", "step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [entry["step"] for entry in read_entries(tmp_path)] == [1, 4], "a line without a format counts from 0"
    assert read_entries(tmp_path / "none") == []
