"""The ledger divides all of a run's wall time, and says what was lost to a restart."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccld.cli import main
from iccld.programs.goodput import CATEGORIES, attempts, read_events, total_of


def launched(time: float, since: float) -> dict[str, Any]:
    return {"time": time, "event": "launched", "since": since}


def event(time: float, kind: str, step: int, stage: str = "stage1") -> dict[str, Any]:
    return {"time": time, "event": kind, "stage": stage, "step": step}


def progress(time: float, step: int, num_steps: int, **seconds: float) -> dict[str, Any]:
    return event(time, "progress", step) | {"num_steps": num_steps, "seconds": seconds}


KILLED = [
    launched(15, since=10),
    event(30, "started", 0),
    progress(130, 100, 100, total=99, data=9, evaluate=10),
    event(135, "saved", 100),
    progress(235, 200, 100, total=104, data=4, save=5),
    launched(310, since=300),  # 50 steps of what the second line tells of are done again
    event(330, "started", 150),
    progress(380, 200, 50, total=50),
    event(390, "preempted", 200),
]


def test_every_second_of_a_killed_run_is_told():
    first, second = attempts(KILLED)
    assert {name: value for name, value in first.seconds.items() if value} == {
        "start": 20, "other": 2, "data": 9 + 2, "evaluate": 10, "save": 2.5, "training": 80 + 47.5, "redone": 52,
    }  # fmt: skip
    assert {name: value for name, value in second.seconds.items() if value} == {
        "down": 300 - 235, "start": 30, "training": 50, "save": 10,
    }  # fmt: skip
    assert sum(total_of([first, second]).values()) == 390 - 10


@st.composite
def runs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Attempts with steps of any length, each going on from some step of the one before it, or killed anywhere."""
    events, time, step = [], 0.0, 0
    second = st.floats(0, 1000)
    for _ in range(draw(st.integers(1, 4))):
        since = time + draw(second)
        time = since + draw(second)
        events.append(launched(time, since))
        if draw(st.booleans()):
            continue
        time += draw(second)
        step = draw(st.integers(0, step))
        events.append(event(time, "started", step))
        for _ in range(draw(st.integers(0, 4))):
            num_steps, total = draw(st.integers(1, 5)), draw(second)
            time, step = time + total + draw(second), step + num_steps
            shares = {name: total / 4 * draw(st.floats(0, 1)) for name in ("data", "save", "evaluate")}
            events += [progress(time, step, num_steps, total=total, **shares)]
            if draw(st.booleans()):
                time += 0.1
                events.append(event(time, "saved", step))
        if draw(st.booleans()):
            time += draw(second) + 1
            events.append(event(time, draw(st.sampled_from(["preempted", "stopped", "finished"])), step))
    return events


@given(runs())
def test_the_parts_are_the_whole(events: list[dict[str, Any]]):
    found = attempts(events)
    total = total_of(found)
    assert set(total) <= set(CATEGORIES) and all(
        seconds >= -1e-6 for each in found for seconds in each.seconds.values()
    )
    assert sum(total.values()) == pytest.approx(max(each["time"] for each in events) - events[0]["since"], abs=1e-3)


def test_clocks_of_two_nodes_that_disagree_count_nothing_twice():
    events = [launched(0, since=0), event(10, "started", 0), launched(12, since=8), event(20, "started", 0)]
    found = attempts(events)
    assert sum(total_of(found).values()) == 20 and found[1].began == 10 and found[1].seconds["down"] == 0


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [json.dumps(each) for each in KILLED]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines[:5], '{"time": 236, "ev', *lines[5:]]) + "\n")
    assert len(read_events(tmp_path)) == len(KILLED)
    assert main(["goodput", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "profile/goodput.json").read_text())
    assert figures["goodput"] == pytest.approx(177.5 / 380) and len(figures["attempts"]) == 2
    assert (tmp_path / "profile/goodput.png").read_bytes().startswith(b"\x89PNG")
    assert "goodput 46.7 % of 0:06:20 in 2 attempts" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "message"), [(None, "no events.jsonl"), ("", "no event `launched`")])
def test_what_is_no_run_is_said(tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]):
    if content is not None:
        (tmp_path / "events.jsonl").write_text(content)
    assert main(["goodput", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
