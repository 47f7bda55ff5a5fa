"""The ledger divides all of a run's wall time, and says what was lost to a restart."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccld.cli import main
from iccld.programs.run.event_times import read_events, straightened
from iccld.programs.run.ledger import CATEGORIES, attempts, total_of


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


def test_steps_that_the_attempt_after_the_next_goes_back_for_count_once():
    """Checkpoints may be damaged: the third attempt goes on from an earlier one than the second did."""
    again = [launched(400, since=400), event(400, "started", 100), progress(500, 200, 100, total=100)]
    first, second, third = attempts([*KILLED, *again])
    assert (first.seconds["redone"], second.seconds["training"], second.seconds["redone"]) == (104, 0, 50)
    assert third.seconds["training"] == 100


def test_a_warning_that_comes_later_is_no_part_of_the_run():
    late = event(9000, "warning", 200) | {"sign": "blurred", "words": "..."}
    assert total_of(attempts([*KILLED, late])) == total_of(attempts(KILLED))


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


def shifted(event: dict[str, Any], by: float) -> dict[str, Any]:
    return event | {name: event[name] + by for name in ("time", "since") if name in event}


def moving(events: list[dict[str, Any]], jumps: dict[int, float]) -> list[dict[str, Any]]:
    """The events as a machine writes them whose clock is moved, before the n-th of them, by jumps[n]."""
    return [shifted(each, sum(jumps.get(n, 0.0) for n in range(number + 1))) for number, each in enumerate(events)]


def of_boot(boot: str, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**each, "boot": boot, "up_s": 1000 + each["time"]} for each in events]


def with_clock(events: list[dict[str, Any]], jumps: dict[int, float], boot: str = "b") -> list[dict[str, Any]]:
    return [
        told | {"time": seen["time"]} | ({"since": seen["since"]} if "since" in seen else {})
        for told, seen in zip(of_boot(boot, events), moving(events, jumps), strict=True)
    ]


YEAR = 3.2e7


@given(runs(), st.dictionaries(st.integers(1, 12), st.floats(-YEAR, YEAR), max_size=3))
def test_a_clock_that_is_moved_changes_nothing(events: list[dict[str, Any]], jumps: dict[int, float]):
    straight, notes = straightened(with_clock(events, {0: 10 * YEAR, **jumps}))
    assert total_of(attempts(straight)) == pytest.approx(total_of(attempts(events)), abs=0.1)
    felt = [jump for number, jump in jumps.items() if number < len(events)]
    if len(felt) == 1 and abs(felt[0]) > 6:
        assert any("moved by" in note for note in notes)


@given(runs(), st.dictionaries(st.integers(1, 12), st.floats(-YEAR, 0), max_size=3))
def test_without_a_second_clock_a_step_back_is_said_and_counts_for_nothing(
    events: list[dict[str, Any]], jumps: dict[int, float]
):
    """Older versions wrote events without the second clock."""
    straight, notes = straightened(moving(events, {0: 10 * YEAR, **jumps}))
    true, total = total_of(attempts(events)), total_of(attempts(straight))
    assert total["training"] == pytest.approx(true["training"], abs=0.1) and min(total.values()) >= -1e-6
    assert sum(total.values()) <= sum(true.values()) + 0.1
    if any(number < len(events) and jump < -4100 for number, jump in jumps.items()):
        assert any("goes back" in note for note in notes)


def test_two_machines_of_which_one_lives_in_another_year():
    one = with_clock(KILLED[:5], {0: 10 * YEAR}, boot="one")
    two = with_clock(KILLED[5:], {0: 9 * YEAR}, boot="two")
    straight, notes = straightened([*one, *two])
    total = total_of(attempts(straight))
    assert total["training"] == pytest.approx(177.5) and sum(total.values()) < 390 and "goes back" in notes[0]


def test_machines_that_alternate_are_each_counted_by_their_own_clock():
    """A rank on another node, whose clock is a year ahead, says what stopped the run between two lines of rank 0."""
    events = [launched(0, since=0), event(0, "started", 0), event(40, "stopped", 0), launched(100, since=100)]
    one, two = of_boot("one", events), of_boot("two", [shifted(events[2], YEAR)])
    straight, _ = straightened([*one[:2], *two, one[3]])
    assert straight[3]["time"] - straight[0]["time"] == pytest.approx(100)


LINES = [
    "null", "5", "[]", '"a"', "{}", '{"event": "progress"}',
    '{"time": 1, "event": 3}', '{"time": NaN, "event": "launched"}',
    '{"time": 1e400, "event": "launched"}', '{"time": -5, "event": "launched"}',
    '{"time": 1, "event": "launched", "since": "x"}',
    '{"time": 1, "event": "started", "stage": [], "step": 1}', '{"time": 1, "event": "started", "stage": "a"}',
    '{"time": 1, "event": "progress", "stage": "a", "step": 1, "num_steps": 0, "seconds": {"total": 1}}',
    '{"time": 1, "event": "progress", "stage": "a", "step": 1, "num_steps": 1, "seconds": {"total": -1}}',
    '{"time": 1, "event": "progress", "stage": "a", "step": 1, "num_steps": 1, "seconds": {}}',
    "[" * 100_000, "\0\0\0", '{"time": 236, "ev',
]  # fmt: skip


def test_lines_that_are_no_events_are_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [json.dumps(each) for each in KILLED]
    (tmp_path / "events.jsonl").write_bytes("\n".join([*lines[:4], *LINES, *lines[4:]]).encode() + b"\n\xff\xfe")
    assert main(["goodput", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "goodput 46.7 % of 0:06:20 in 2 attempts" in said and f"{len(LINES) + 1} lines of " in said


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [json.dumps(each) for each in KILLED]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines[:5], '{"time": 236, "ev', *lines[5:]]) + "\n")
    assert len(read_events(tmp_path)[0]) == len(KILLED)
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
