"""A run on a terminal shows a header and a live line, and is never silent; elsewhere it prints plain lines."""

import itertools
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from iccld import outcome
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure import terminal
from iccld.runtime.measure.terminal import (
    LiveTerminal,
    Place,
    PlainTerminal,
    Terminal,
    is_watched,
    open_terminal,
    plain_line,
)
from iccld.runtime.settings import WatchdogConfig
from tests.factory import scene_overrides

SILENT_S = 5.0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ENTRY = {"stage": "stage1", "step": 50, "loss": 0.5, "step_s": 2.0, "samples_per_s": 8.0, "data_wait": 0.02}
RATES = {"learning_rate/encoder": 6e-5, "learning_rate/decoder": 6e-4}


def command(shards: Path, run_dir: Path) -> list[str]:
    short = ["stages=[stage1]", "stage1.trainer.num_steps=4", "evaluation.max_images=1", "metrics.log_every=2"]
    short += ["stage1.trainer.evaluate_every=2", "evaluation.diagnostic_images=0", "metrics.pictures.every=2"]
    return [sys.executable, "-m", "iccld", "train", *scene_overrides(shards, run_dir), *short]


def chunks(given: list[str]) -> Iterator[tuple[float, str]]:
    """Yield what a command writes to a terminal of its own, with the seconds before each piece."""
    ours, its = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200", "LINES": "40"}
    with subprocess.Popen(given, stdin=its, stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        last = time.monotonic()
        while select.select([ours], [], [], 60.0)[0]:
            try:
                text = os.read(ours, 1 << 16).decode(errors="replace")
            except OSError:  # its other end is closed
                break
            now = time.monotonic()
            yield now - last, text
            last = now
        os.close(ours)
    assert process.returncode == 0


def test_a_run_on_a_terminal_is_never_silent(scene_shards: Path, tmp_path: Path):
    pieces = [*chunks(command(scene_shards, tmp_path / "run"))]
    assert max(seconds for seconds, _ in pieces) < SILENT_S
    text = ESCAPES.sub("", "".join(piece for _, piece in pieces))
    facts = ("device", "ranks", "engine", "precision", "parameters", "steps", "run directory")
    assert all(re.search(rf"^{fact} +\S", text, re.MULTILINE) for fact in facts), "the header"
    for part in ("starting", "stage1  getting ready", "scoring", "leaving the models"):
        assert part in text, part
    live = re.compile(r"stage1 \d/4  .*loss \d.*samples/s.*data wait.*lr \S+.*mIoU [\d.]+ \(step 2\).*saved \d.*ETA \d")
    assert live.search(text), text
    assert "stage1 step 4/4  loss" in text and "written to" in text, "what stays"
    assert "\x1b[?25h" in "".join(piece for _, piece in pieces), "the cursor is shown"


def test_a_pipe_gets_plain_lines(scene_shards: Path, tmp_path: Path):
    environment = os.environ | {"TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
    given, began = command(scene_shards, tmp_path / "run"), time.monotonic()
    with subprocess.Popen(given, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        said = [(time.monotonic(), line) for line in process.stdout]
    assert process.returncode == 0
    times = [began, *(at for at, _ in said), time.monotonic()]
    assert max(after - before for before, after in itertools.pairwise(times)) < SILENT_S
    text = "".join(line for _, line in said)
    assert "\x1b" not in text and "\r" not in text
    figures = re.findall(r"^(stage1 step \d/4)  loss", text, re.MULTILINE)
    assert figures == ["stage1 step 2/4", "stage1 step 4/4"]
    assert not re.search(r"^(device|engine)", text, re.MULTILINE)


def test_plain_lines_say_what_lasts_between_steps():
    shown, now = PlainTerminal("starting"), time.monotonic()
    assert [shown.due(now + s) for s in (1, 3.2, 4, 6.1)] == ["", "starting, 0:03", "", ""]
    shown.header({"stage": "stage1"})
    shown.follow(Fixed("stage1", 2, "evaluate", 24, 60))
    scoring = "stage1 2  scoring 24 of 60 images"
    assert [shown.due(now + s) for s in (6.6, 9.7)] == [f"{scoring}, 0:00", f"{scoring}, 0:03"]
    shown.progress(ENTRY, 1000)
    shown.follow(Fixed("stage1", 51, "forward"))
    assert not shown.due(now + 100), "figures come every metrics.log_every steps"
    shown.follow(Fixed("stage1", 60, "save"))
    assert shown.due(now + 101) == "stage1 60/1000  saving, 0:00"


def test_passes_over_the_same_images_are_told_apart(tmp_path: Path):
    watchdog, shown = Watchdog(tmp_path, WatchdogConfig(enabled=False)), PlainTerminal("starting")
    shown.follow(watchdog)
    watchdog.begin("evaluation")
    watchdog.phase("evaluate")
    lines = []
    for _ in range(2):
        for done in range(2):
            watchdog.tick(done, 2)
            lines.append(shown.line(shown._since).partition("scoring ")[2])
    assert lines == [f"{done} of 2 images{again}, 0:00" for again in ("", ", pass 2") for done in range(2)]
    watchdog.tick()
    assert "images" not in shown.line(shown._since), "what is done aside is not counted"


def test_plain_lines_come_from_a_thread_that_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(terminal, "QUIET_S", 0.01)
    said, limit = "", time.monotonic() + 60
    with PlainTerminal("starting") as shown:
        while not said and time.monotonic() < limit:
            time.sleep(0.01)
            said = capsys.readouterr().out
    assert said.splitlines()[0] == "starting, 0:00" and not shown._thread.is_alive()


class Fixed:
    """A watchdog that stands where it is told."""

    def __init__(self, *place: str | int) -> None:
        self.place = Place(*place)  # type: ignore[arg-type]


def live(*place: str | int) -> LiveTerminal:
    shown = LiveTerminal("starting")
    shown.header({"stage": "stage1"})
    shown.follow(Fixed(*place))
    return shown


def test_the_live_line_has_what_is_known_and_no_figures_of_another_stage():
    shown = live("stage1", 60, "forward")
    shown.event("started", {"step": 40})
    assert shown.line(0.0) == "|  stage1 60  first steps, 0:00  saved 40"
    shown.progress(ENTRY | RATES, 1000)
    shown.scored({"step": 50, "miou": 43.214})
    shown.event("saved", {"step": 50})
    expected = "stage1 60/1000  loss 0.5000  8.0 samples/s  data wait 2 %  lr 6.0e-05 6.0e-04  "
    assert shown.line(0.25) == f"/  {expected}mIoU 43.21 (step 50)  saved 50  ETA 31:20"
    shown.follow(Fixed("stage1", 60, "evaluate", 7, 60))
    assert "stage1 60/1000  scoring 7 of 60 images, 0:00  loss" in shown.line(100.0)
    assert "scoring 7 of 60 images, 1:01  loss" in shown.line(161.0)
    shown.follow(Fixed("stage2", 0, "start"))
    assert shown.line(162.0) == "|  stage2  getting ready, 0:00"


def test_only_rank_0_on_a_terminal_that_can_redraw_has_a_live_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RANK", raising=False)
    assert is_watched() and isinstance(open_terminal("starting"), LiveTerminal)
    for name, value, kind in (("TERM", "dumb", PlainTerminal), ("RANK", "1", Terminal)):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert not is_watched() and type(open_terminal("starting")) is kind


def test_what_is_said_directly_clears_the_live_line_first(monkeypatch: pytest.MonkeyPatch):
    written: list[bytes] = []
    monkeypatch.setattr(outcome.os, "write", lambda _, data: written.append(data))
    monkeypatch.setattr(outcome.os, "isatty", lambda _: True)
    for is_live in (True, False):
        outcome.over_live_line(is_live)
        outcome.say("a word")
    assert written == [b"\r\x1b[2Ka word\n", b"a word\n"]


def test_importing_it_is_cheap():
    code = f"import sys, {terminal.__name__}; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert plain_line(ENTRY, 100).endswith("ETA 1:40") and plain_line(ENTRY, 40_000).endswith("ETA 22:11:40")
