"""Runs of strangers: one odd field ends no command, and no text of theirs commands the terminal."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from iccld.cli import main
from iccld.data.shards.converters import InputTree
from iccld.data.shards.converters.pattern import Pattern
from iccld.labels import own_class_set
from iccld.models.best_model import score_of
from iccld.programs.run.saved_scores import evaluations
from iccld.runtime.checkpoint.manifest import write_manifest
from iccld.tables import cell
from tests.programs.recorded_runs import make_run, write_lines

HOSTILE = "\x1b]0;title\x07 [/bold] [link=file:///etc]x[/link]"


def make_checkpoint(folder: Path, **facts: Any) -> Path:
    checkpoint = folder / "stage1/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    layout = {"engine": HOSTILE, "world_size": 1}
    write_manifest(checkpoint, {"step": 1, "stage": "stage1", "layout": layout, "files": {}, "tensors": {}, **facts})
    return checkpoint


def test_a_cell_shows_commands_and_markup_as_letters():
    assert cell(HOSTILE) == r"\x1b]0;title\x07 \[/bold] \[link=file:///etc]x\[/link]"


def test_no_text_of_a_run_reaches_the_terminal_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_lines(
        tmp_path / "events.jsonl", [{"event": "launched", "time": 1000}, {"event": f"a{HOSTILE}", "time": 1001}]
    )
    assert main(["goodput", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    make_checkpoint(tmp_path / f"run{HOSTILE[:3]}")
    for action in ("list", "verify"):
        assert main(["checkpoint", action, str(tmp_path / f"run{HOSTILE[:3]}")]) == 0
    said = capsys.readouterr().out
    assert "\x1b]" not in said and "\x07" not in said and "[/bold]" in said and r"run\x1b" in said


@pytest.mark.parametrize("losses", [(1e308, -1e308), (5e-324, 1.0)])
def test_a_loss_that_no_axis_holds_and_an_infinite_colour_leave_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], losses: tuple[float, float]
):
    run = make_run(tmp_path / "run", done=100)
    lines = [{"format": 2, "stage": "stage1", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    write_lines(run / "metrics.jsonl", lines)
    card = run / "stage1/final/teacher/config.json"
    card.parent.mkdir(parents=True)
    card.write_text('{"class_names": ["a"], "palette": [[Infinity, 0, 0]]}')
    for command in (["report", str(run)], ["runs", str(run)]):
        assert main(command) == 0, capsys.readouterr().err


def test_a_score_with_hundreds_of_digits_is_none(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"origin": {"score": {"miou": 1%s}}}' % ("0" * 400))
    assert score_of(tmp_path) is None


@pytest.mark.parametrize("facts", [{}, {"config": []}, {"config": {"stages": ["stage1"]}}])
def test_a_checkpoint_that_describes_no_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], facts: dict[str, Any]
):
    checkpoint = make_checkpoint(tmp_path, **facts)
    assert main(["checkpoint", "export", str(checkpoint), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", [7, HOSTILE, "a\nb"])
def test_a_class_has_a_printable_name(name: Any):
    with pytest.raises(ValueError, match=r"^classes: .* must be a name of printable letters\.$"):
        own_class_set([name, "b"], [[0, 0, 0], [1, 1, 1]])


def test_a_zip_of_a_later_version_is_named(tmp_path: Path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 99
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.zip cannot be read as a zip \(zip file version 9\.9\)"):
        InputTree(path)


def test_results_of_very_many_names_are_refused():
    with pytest.raises(ValueError, match=r"has 1,001 parts, and at most 1,000 are read"):
        next(evaluations({f"a{number}": {"miou": 1.0} for number in range(1001)}))


@pytest.mark.parametrize("text", ["{a}{b}.png", "{a*}/{b*}/{c*}.png"])
def test_a_pattern_that_would_be_matched_for_ever_is_not_sound(text: str):
    assert not Pattern(text).is_sound() and Pattern("{a*}/{b}_{c*}.png").is_sound()
