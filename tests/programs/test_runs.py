"""`iccld runs` and `iccld compare` on recorded runs: what they print, that they write nothing, and start at once."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from iccld.cli import main
from iccld.programs.compare import pairs
from iccld.programs.run.record import read_records
from iccld.programs.runs import run_dirs
from tests.programs.recorded_runs import make_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path / "grid/a/seed_0", gain=1.0)
    make_run(tmp_path / "grid/b/seed_0", stages=["stage1", "stage2"], done=120, seed=3)
    make_run(tmp_path / "grid/c", gain=2.0)
    return tmp_path


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def row(output: str, name: str) -> list[str]:
    [line] = [line for line in output.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_runs_lists_state_step_scores_goodput_and_what_is_unusual(root: Path, capsys: pytest.CaptureFixture[str]):
    before = content(root)
    assert main(["runs", str(root)]) == 0
    output = capsys.readouterr().out
    assert row(output, "a/seed_0") == ["a/seed_0", "finished", "stage1", "200/200", "65.57", "65.57", "66.9 %", ""]
    assert row(output, "b/seed_0")[1:6] == ["stopped", "stage1", "120/200", "32.38", "32.38"]
    assert row(output, "b/seed_0")[7] == "seed=3 stages=[stage1, stage2]"
    assert content(root) == before, "it only reads"


def test_no_link_is_followed_and_a_run_holds_no_runs(root: Path):
    make_run(root / "grid/c/inner")
    (root / "grid/link").symlink_to(root / "grid/a", target_is_directory=True)
    assert sorted(path.relative_to(root).as_posix() for path in run_dirs(root)) == [
        "grid/a/seed_0", "grid/b/seed_0", "grid/c"
    ]  # fmt: skip


def test_compare_shows_settings_and_scores_by_class(root: Path, capsys: pytest.CaptureFixture[str]):
    before = content(root)
    assert main(["compare", str(root / "grid/a/seed_0"), str(root / "grid/c")]) == 0
    output = capsys.readouterr().out
    assert row(output, "mIoU") == ["mIoU", "65.57", "66.57", "+1.00"]
    assert row(output, "kerb & grass")[1:] == ["39.50", "38.50", "-1.00"]
    assert row(output, "<b>bike</b>")[1:] == ["-", "-", "-"] and "settings that differ" not in output
    assert main(["compare", str(root / "grid/a/seed_0"), str(root / "grid/b/seed_0")]) == 0
    output = capsys.readouterr().out
    assert row(output, "seed") == ["seed", "0", "3"] and "no final scores to compare" in output
    assert content(root) == before, "it only reads"


def test_equal_scores_are_one_line_and_last_stages_pair_where_nothing_is_shared(root: Path, capsys):
    make_run(root / "again", gain=1.0)
    assert main(["compare", str(root / "grid/a/seed_0"), str(root / "again")]) == 0
    assert "the same scores: stage1" in capsys.readouterr().out
    results = root / "grid/c/report/results.json"
    results.write_text(results.read_text().replace('"stage1": {"names"', '"stage2": {"1": {"names"', 1).replace(
        '"num_images": 60}', '"num_images": 60}}', 1
    ))  # fmt: skip
    [(label, one, other)] = pairs(*read_records([root / "again", root / "grid/c"]))
    assert label == "stage1 and stage2 x1" and (one.means["miou"], other.means["miou"]) == (65.57, 66.57)


def test_scores_of_different_sets_are_named_as_such(root: Path, capsys: pytest.CaptureFixture[str]):
    words = ["compare", str(root / "grid/a/seed_0"), str(root / "grid/c")]
    assert main(words) == 0 and "different sets" not in capsys.readouterr().out
    results = root / "grid/c/report/results.json"
    results.write_text(results.read_text().replace('"shards": "validation"', '"shards": "other"', 1))
    assert main(words) == 0
    assert "the runs were scored on different sets: validation and other\n" in capsys.readouterr().out


def test_where_there_is_no_run_it_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for words in (["runs", str(tmp_path)], ["runs", str(tmp_path / "no")], ["compare", str(tmp_path), str(tmp_path)]):
        assert main(words) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("verb", ["runs", "compare"])
def test_neither_loads_torch(root: Path, verb: str):
    places = [str(root)] if verb == "runs" else [str(root / "grid/c"), str(root / "grid/a/seed_0")]
    code = (
        f"import sys; from iccld.cli import main; assert main({[verb, *places]!r}) == 0; "
        f"assert not {{'torch', 'hydra', 'matplotlib'}} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("a", "b", "sweep/0"):
        make_run(tmp_path / "runs" / name, gain=len(name))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/comparing-runs.md").read_text().replace("\\\n", "")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^iccld .*$", text, re.MULTILINE)]
    ours = [words[1:] for words in commands if words[1] in ("report", "runs", "compare")]
    assert len(ours) == 5
    for words in ours:
        assert main(words) == 0, words
    assert (tmp_path / "runs/a/report/report.html").is_file() and (tmp_path / "runs/report.html").is_file()
