"""The page of a run: everything in one file, nothing of a stranger's interpreted, written whole or not at all."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from iccld.cli import main
from iccld.durable import is_real_folder
from iccld.programs.report.charts import MAX_POINTS, _axis, _thinned, line_chart
from iccld.programs.report.markup import Markup, tag
from iccld.programs.report.pictures import MAX_SHOWN, pictures_of
from iccld.programs.run.record import read_record
from tests.programs.recorded_runs import make_run, write_lines


class Outline(HTMLParser):
    """The elements of a page, the text of each section by its id, and whether all that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.opened.append(tag)
        if tag == "section":
            self.sections[str(dict(attrs)["id"])] = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        if "section" in self.opened:
            self.sections[list(self.sections)[-1]] += data + " "


def page_of(*run_dirs: Path, output: Path) -> Outline:
    assert main(["report", *map(str, run_dirs), "--output", str(output)]) == 0
    outline = Outline(output.read_text())
    assert not outline.opened
    return outline


def test_a_page_of_one_run_has_all_parts(tmp_path: Path):
    page = page_of(make_run(tmp_path / "run"), output=tmp_path / "out/page.html")
    assert list(page.sections) == [
        "overview", "warnings", "scores", "curves", "pictures", "time-and-goodput", "diagnostics", "restarts",
        "checkpoints", "settings",
    ]  # fmt: skip
    assert "finished" in page.sections["overview"] and "200 of 200" in page.sections["overview"]
    assert {"lane", "91.20", "64.57"} < set(page.sections["scores"].split())
    assert all(word in page.sections["curves"] for word in ("losses", "learning rate", "norm of the gradients", "mIoU"))
    assert "66.9 %" in page.sections["time-and-goodput"] and "attempt 2" in page.sections["time-and-goodput"]
    assert "kerb" in page.sections["warnings"] and "stage1.trainer.num_steps 200 40000" in page.sections["settings"]
    images = [attributes for name, attributes in page.tags if name == "img"]
    assert len(images) == 3 and all(str(image["src"]).startswith("data:image/") for image in images)
    colours = {str(attributes.get("style")) for name, attributes in page.tags if name == "span"}
    assert "background:#804080" in colours, "the colours of the model card"


def test_a_checkpoint_that_a_training_removes_meanwhile_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run", done=120)
    shutil.copytree(run / "stage1/checkpoints/step_00000120", old := run / "stage1/checkpoints/step_00000060")

    def there_and_then_removed(path: Path) -> bool:
        return shutil.rmtree(path) is None if path == old else is_real_folder(path)

    monkeypatch.setattr("iccld.programs.report.sections.is_real_folder", there_and_then_removed)
    checkpoints = page_of(run, output=tmp_path / "page.html").sections["checkpoints"]
    assert "120" in checkpoints and "60" not in checkpoints


def test_runs_stand_side_by_side_with_their_differences(tmp_path: Path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", gain=1.5, seed=7)]
    page = page_of(*runs, output=tmp_path / "page.html")
    assert "seed 0 7" in page.sections["differences"]
    assert "64.57 66.07 +1.50" in page.sections["scores"] and "40.50 39.00 -1.50" in page.sections["scores"]
    assert page.sections["curves"].endswith("one two "), "the legend of the last chart"
    assert "one" in page.sections["time-and-goodput"] and "two" in page.sections["time-and-goodput"]


def test_nothing_of_a_run_is_markup_and_nothing_is_fetched(tmp_path: Path):
    bad = '</style><script>alert(1)</script><img src="http://example.org/x">'
    run = make_run(tmp_path / f"run{bad.replace('/', '')}", seed=bad)
    card = run / "stage1/final/teacher/config.json"
    card.write_text(json.dumps({"class_names": [bad, "b", "c", "d"], "palette": [[1, 2, 3]] * 4}))
    results = json.loads((run / "report/results.json").read_text())
    results["stage1"]["names"][0] = results["diagnostics"][bad] = bad
    results["diagnostics"][bad] = {bad: {"miou": 1.0}}
    (run / "report/results.json").write_text(json.dumps(results))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    events[1]["layout"] = {"engine": bad}
    write_lines(run / "events.jsonl", [*events, {"time": 1e9, "event": "warning", "stage": bad, "words": bad}])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [line | {f"loss/{bad}": 1.0} for line in lines])
    page = page_of(run, output=tmp_path / "page.html")
    names = {name for name, _ in page.tags}
    assert not names & {"script", "iframe", "object", "link", "a"} and "alert(1)" in page.sections["warnings"]
    attributes = [(key, str(value)) for _, found in page.tags for key, value in found.items()]
    assert all(value.startswith("data:image/") for key, value in attributes if key in ("src", "href"))
    assert not [key for key, _ in attributes if key.startswith("on")]
    assert "default-src 'none'" in (tmp_path / "page.html").read_text()


def test_a_torn_run_and_an_empty_one_give_a_page_that_says_what_is_missing(tmp_path: Path):
    run = make_run(tmp_path / "run", done=120)
    (run / "config.yaml").write_text("{")
    (run / "metrics.jsonl").write_text('{"stage": "stage1", "step": 3, "loss": NaN}\n{"sta')
    page = page_of(run, output=tmp_path / "page.html")
    assert "config.yaml" in page.sections["notes"] and "curves" not in page.sections and "scores" not in page.sections
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/events.jsonl").write_text("")
    assert "not started" in page_of(tmp_path / "empty", output=tmp_path / "page.html").sections["overview"]


def test_pictures_lead_nowhere_and_are_few(tmp_path: Path):
    run = make_run(tmp_path / "run")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    (run / "pictures/link.png").symlink_to(secret)
    (run / "predictions").symlink_to(tmp_path, target_is_directory=True)
    (run / "pictures/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    record = read_record(run)
    assert [picture.name for picture in pictures_of(record)] == [f"pictures/street_{i}_overlay.png" for i in range(3)]
    assert len(record.notes) == 1 and "broken.png" in record.notes[0]
    for number in range(20):
        Image.new("RGB", (2000, 10), (number, 0, 0)).save(run / f"pictures/y_{number}.png")
    (run / "pictures/broken.png").rename(run / "pictures/5²6.png")  # a digit that is no number
    found = pictures_of(record)
    assert [picture.name for picture in found] == [f"pictures/y_{i}.png" for i in range(20 - MAX_SHOWN, 20)]
    assert (found[0].width, found[0].height) == (960, 5)


def test_the_page_of_one_run_has_a_place_and_is_written_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    place = run / "report/report.html"
    assert capsys.readouterr().out.strip() == str(place)
    before = place.read_text()
    monkeypatch.setattr("iccld.durable.sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert main(["report", str(run)]) == 75 and place.read_text() == before
    assert sorted(path.name for path in place.parent.iterdir()) == ["report.html", "results.json"]


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [str(make_run(tmp_path / name)) for name in ("a", "b")]
    for words, said in (
        ([str(tmp_path)], "no run in"),
        (runs, "--output must name"),
        ([runs[0], "--output", str(tmp_path)], "is a folder"),
    ):
        assert main(["report", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert said in line


def test_a_chart_draws_each_curve_within_its_axes():
    assert line_chart("none", [("a", [])]) == ""
    text = line_chart("a & b", [("<a>", [(i, 10.0 ** (i % 7)) for i in range(1, 2000)]), ("b", [(5, 1.0)])])
    points = [tuple(map(float, pair.split(","))) for pair in re.findall(r'points="([^"]*)"', text)[0].split()]
    assert len(points) <= MAX_POINTS + 1 and all(0 <= x <= 430 and 0 <= y <= 230 for x, y in points)
    assert "a &amp; b (logarithmic)" in text and "&lt;a&gt;" in text
    for values in ([0.0], [5.0, 5.0], [-1e9, 1e9], [1e-9, 2e-9], [1e300, 1e301], [0.0, 1e-320]):
        axis = _axis(values, 200, 10)
        assert axis.low <= min(values) and max(values) <= axis.high and 2 <= len(axis.ticks) <= 12
    assert _thinned([(i, 0.0) for i in range(1001)])[-1] == (1000, 0.0)


def test_text_is_escaped_once():
    assert tag("p", "<&>", tag("b", "'"), title='"') == '<p title="&quot;">&lt;&amp;&gt;<b>&#x27;</b></p>'
    assert isinstance(tag("p"), Markup)
