"""A run directory is read as far as it can be: unfinished, torn, of an earlier version, or a stranger's."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from iccld.programs.run.metric_lines import curve, number, read_entries
from iccld.programs.run.record import BEAT_S, differing, read_record, read_records
from iccld.programs.run.saved_scores import read_own
from iccld.texts import shown
from tests.programs.recorded_runs import make_run


def test_a_finished_run_is_read_whole(tmp_path: Path):
    record = read_record(make_run(tmp_path / "run"))
    assert (record.state, record.position) == ("finished", ("stage1", 200))
    assert record.score == ("stage1", 64.57) == record.best_score
    assert record.settings["stage1.trainer.num_steps"] == 200
    assert len(record.attempts) == 2 and record.goodput == pytest.approx(0.669, abs=1e-3)
    assert record.results.scores["stage1"].iou["<b>bike</b>"] is None
    assert record.results.diagnostics["stage1"]["stage1"]["miou"] == 64.0 and not record.notes


def test_an_unfinished_run_has_the_newest_and_the_best_score_of_its_training(tmp_path: Path):
    run = make_run(tmp_path / "run", done=160)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "stage1", "step": 199, "miou": 1.0}) + "\n")
    record = read_record(run)
    assert record.score == ("stage1", 1.0) and record.best_score == ("stage1", 20 + 149 / 8)


def test_a_run_may_have_any_stage_but_none_that_leads_out_of_it(tmp_path: Path):
    run = make_run(tmp_path / "run", stages=["stage3"])
    for file in filter(Path.is_file, run.rglob("*")):
        if file.suffix in (".yaml", ".json", ".jsonl"):
            file.write_text(file.read_text().replace("stage1", "stage3"))
    (run / "stage1").rename(run / "stage3")
    for name in ("..", "/etc", "a/b", 7, ["x"]):
        with (run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"event": "finished", "time": 1.8e9, "stage": name, "step": 9}) + "\n")
    record = read_record(run)
    assert record.all_stages == record.stages == ["stage3"] and record.position == ("stage3", 200)
    assert record.score == record.best_score == ("stage3", 64.57)
    (run / "stage3/final").rename(run / "stage3/gone")
    assert read_record(run).state != "finished"


def test_a_run_of_which_no_stage_is_known_is_not_finished(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for name in ("config.yaml", "events.jsonl", "metrics.jsonl"):
        (run / name).write_text("")
    assert read_record(run).all_stages == [] and read_record(run).state == "not started"


SCORES = {"names": [], "iou": [], "miou": 1.0}


@pytest.mark.parametrize(
    ("results", "last"),
    [
        ({}, None),
        ({"stage1": SCORES}, "stage1"),
        ({"stage1": SCORES, "stage2": {"0": SCORES}}, "stage1"),
        ({"stage1": SCORES, "stage2": {"0": SCORES, "4": SCORES, "1": SCORES}}, "stage2 x4"),
        ({"stage1": SCORES, "stage2": {"4": SCORES}, "stage2_mean_latent": SCORES}, "stage2 x4"),
        ({"stage1": SCORES, "stage2": {"4": SCORES}, "stage2_oracle": SCORES}, "stage2 x4"),
        ({"stage1": SCORES, "stage_3": {"4": SCORES}, "about": {}, "diagnostics": {}}, "stage_3 x4"),
    ],
)
def test_the_last_stage_is_scored_with_the_first_number_of_steps_that_denoise(
    tmp_path: Path, results: dict[str, Any], last: str | None
):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/results.json").write_text(json.dumps(results))
    found = read_own(tmp_path)
    assert (found.last and found.last[0]) == last
    assert "mean latent" in found.scores or "stage2_mean_latent" not in results


def test_a_run_is_running_while_its_lock_beats_and_ends_as_its_last_event_says(tmp_path: Path):
    run = make_run(tmp_path / "run", done=120)
    assert read_record(run).state == "stopped"
    (run / "lock").write_text("process 7 on node3\nboot 1\nbeat 4")
    assert read_record(run).state == "running"
    before = time.time() - 2 * BEAT_S
    os.utime(run / "lock", (before, before))
    assert read_record(run).state == "stopped", "a crash leaves its beat behind"
    lines = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text("\n".join(lines[:-1]))
    assert read_record(run).state == "failed", "neither a signal nor the end"
    with (run / "events.jsonl").open("a") as file:
        file.write('\n{"event": "preempted", "time": 1.8e9, "stage": "evaluation"}\n')
    assert read_record(run).state == "failed", "a signal has stopped `iccld evaluate`, and not the training"
    (run / "events.jsonl").write_text("")
    assert read_record(run).state == "not started"


def test_torn_files_cost_what_is_torn_and_a_note_says_so(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("seed: [1")
    (run / "report/results.json").write_text('{"stage1": {"names": ["a"')
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).write_text((run / name).read_text() + '{"stage": "stage1", "st\n[[[[1]]]]\n7\n')
    record = read_record(run)
    assert len(record.notes) == 3 and "config.yaml" in record.notes[0]
    assert record.position == ("stage1", 200) and record.settings == {}
    assert record.score == ("stage1", 20 + 199 / 8), "of the training, as the results are torn"


@pytest.mark.parametrize(
    "results",
    [
        [],
        {"stage1": 7},
        {"stage1": {"miou": 1}},
        {"stage1": {"miou": "x", "names": ["a"], "iou": []}},
        {"stage2": {"x": 1}},
    ],
)
def test_results_that_are_none_are_left_out(tmp_path: Path, results: object):
    run = make_run(tmp_path / "run")
    (run / "report/results.json").write_text(json.dumps(results))
    assert read_record(run).results.scores == {}


def test_numbers_of_strangers(tmp_path: Path):
    assert [number(value) for value in (1, 2.5, True, "3", None, float("nan"), float("inf"), 10**400, [])] == [
        1.0, 2.5, None, None, None, None, None, None, None,
    ]  # fmt: skip
    entries = [
        {"stage": "s", "step": 4, "loss": 1.0},
        {"stage": ["s"], "step": 5, "loss": 2.0},
        {"stage": "s", "step": 4},
    ]
    assert curve(entries, "loss", stage="s") == [(4, 1.0)]
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000 + '\n{"stage": "s", "step": 0}\n')
    assert [entry["step"] for entry in read_entries(tmp_path)] == [1], "a line without a format counts from 0"
    lines = [json.dumps({"format": 2, "stage": "s", "step": step}) for step in (9, -1, True, "3", 1e3, 1 << 60)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [entry["step"] for entry in read_entries(tmp_path)] == [9]


def test_secrets_that_were_left_behind_are_hidden(tmp_path: Path):
    run = make_run(tmp_path / "run", data__source__shards="s3://user:hunter22@host/x?token=abcd1234")
    with (run / "config.yaml").open("a") as file:
        file.write("storage:\n  options: {key: hunter33}\n")
    text = str(read_record(run).settings)
    assert "hunter" not in text and "abcd1234" not in text and "s3://host/x" in text


def test_runs_are_named_by_what_tells_them_apart_and_a_run_is_given_once(tmp_path: Path):
    runs = [make_run(tmp_path / "a/seed_0"), make_run(tmp_path / "b/seed_0", seed=1)]
    records = read_records(runs)
    assert [record.name for record in records] == ["a/seed_0", "b/seed_0"]
    assert differing(records) == {"seed": [0, 1]}
    with pytest.raises(ValueError, match="given twice"):
        read_records([runs[0], runs[0] / "../seed_0"])


def test_no_command_reaches_the_terminal():
    assert shown("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"


def test_a_score_of_a_later_stage_is_newer_than_the_results_of_an_earlier_one(tmp_path: Path):
    run = make_run(tmp_path / "run", stages=["stage1", "stage2"], stage2__trainer__num_steps=9)
    assert read_record(run).score == ("stage1", 64.57)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"format": 2, "stage": "stage2", "step": 5, "miou": 31.0}) + "\n")
    assert read_record(run).score == ("stage2", 31.0) and read_record(run).best_score == ("stage1", 64.57)
