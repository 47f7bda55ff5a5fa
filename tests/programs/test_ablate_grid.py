"""The grid of `iccld ablate`: what is wrong is one line, and tasks are begun in an order that their needs allow."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccld.programs.ablate.grid import Grid, Row, merged, parse_grid, read_grid
from iccld.programs.ablate.tasks import State, Task, blocked_tasks, devices_of, next_task, tasks_of

WHOLE: dict[str, Any] = {
    "baseline": "a",
    "seeds": [0, 1],
    "common": ["model=tiny", "stage=all"],
    "runs": {"a": {"settings": ["stage=segmentation"]}, "b": {"after": "a", "settings": ["stage=adversarial"]}},
}


def test_a_grid_is_read_with_the_common_settings_first_and_each_setting_once(tmp_path: Path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "baseline: a\nseeds: [0, 3]\ncommon: [model=tiny, stage=all]\n"
        "runs:\n  a: {settings: [stage=segmentation]}\n  b: {after: a, settings: [x.y=1], about: more}\n"
    )
    grid = read_grid(path)
    assert grid.baseline == "a" and grid.seeds == (0, 3)
    assert grid.rows["a"].settings == ("model=tiny", "stage=segmentation")
    assert grid.rows["b"] == Row("b", ("model=tiny", "stage=all", "x.y=1"), after="a", about="more")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"baseline": "c"}, "baseline='c' must be a name under runs; use one of a, b"),
        ({"baseline": ["a"]}, "baseline="),
        ({"seeds": []}, "seeds=[] must be different whole numbers"),
        ({"seeds": [0, 0]}, "seeds=[0, 0]"),
        ({"seeds": [True]}, "seeds=[True]"),
        ({"seeds": [-1]}, "seeds=[-1]"),
        ({"seeds": 3}, "seeds=3"),
        ({"common": "model=tiny"}, "common='model=tiny' must be a list of key=value texts"),
        ({"common": ["model"]}, "common: 'model' must be key=value"),
        ({"common": [{"model": "tiny"}]}, "must be a list of key=value texts"),
        ({"common": ["seed=3"]}, "seed=3 is set by the grid"),
        ({"common": ["+run_dir=x"]}, "+run_dir=x is set by the grid"),
        ({"common": ["stage1_from=x"]}, "stage1_from=x is set by the grid"),
        ({"common": ["data.source.shards=https://me:pw@host/x"]}, "data.source.shards holds a secret"),
        ({"runs": {}}, "runs={} must map at least one name to settings"),
        ({"runs": {"a": None}}, "runs.a: None must be `key: value` lines; a run has settings, after, initial, about"),
        ({"runs": {"a": {"setting": []}}}, "runs.a: setting is unknown"),
        ({"runs": {"../a": {}}}, "names a folder"),
        ({"runs": {1: {}}}, "names a folder"),
        ({"runs": {"lock": {}}}, "names a folder"),
        ({"runs": {"a.json": {}}}, "names a folder"),
        ({"runs": {"a": {"after": "b"}}}, "runs.a.after='b' must be a name under runs"),
        ({"runs": {"a": {"after": "a"}}}, "leads back to a"),
        ({"runs": {"a": {"after": "b"}, "b": {"initial": "a"}}}, "leads back to a"),
        ({"runs": {"a": {}, "b": {"after": "a", "initial": "a"}}}, "keep one"),
        ({"runs": {"a": {}, "b": {"initial": "a", "settings": ["initial_model=x"]}}}, "keep one of them"),
        ({"runs": {"a": {"about": 3}}}, "runs.a.about=3 must be text on one line"),
        ({"more": 1}, "more is unknown; the grid has baseline, seeds, common, runs"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(change: dict[str, Any], words: str):
    with pytest.raises(ValueError) as caught:
        parse_grid(WHOLE | change, where="grid.yaml")
    text = str(caught.value)
    assert text.startswith("grid.yaml: ") and words in text and "\n" not in text and "pw@" not in text


def test_two_rows_that_wait_for_a_circle_of_others_are_refused_too():
    runs = {"a": {}, "b": {"after": "c"}, "c": {"after": "b"}, "d": {"after": "b"}}
    with pytest.raises(ValueError, match="leads back to b"):
        parse_grid(WHOLE | {"runs": runs}, where="x")


@given(st.lists(st.lists(st.sampled_from(["a=1", "a=2", "+a=3", "b=1", "b.c=2", "~b"]), max_size=4), max_size=4))
def test_of_settings_of_one_name_the_last_is_kept(parts: list[list[str]]):
    words = [word for part in parts for word in part]
    found = merged(*parts)
    keys = [word.partition("=")[0].lstrip("+~") for word in found]
    assert len(set(keys)) == len(keys)
    for key, word in zip(keys, found, strict=True):
        assert word == [other for other in words if other.partition("=")[0].lstrip("+~") == key][-1]
    assert merged(found) == found


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """A grid whose rows wait for rows that stand anywhere in it, without circles."""
    names = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True))
    order = draw(st.permutations(names))
    rows = {}
    for name in names:
        earlier = ["", *order[: order.index(name)]]
        rows[name] = Row(name, (), after=draw(st.sampled_from(earlier)))
    return Grid(names[0], tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))), rows)


@given(grids(), st.data())
def test_every_task_ends_once_and_none_begins_before_what_it_needs(grid: Grid, data: st.DataObject):
    needs = tasks_of(grid)
    assert set(needs) == {Task(name, seed) for name in grid.rows for seed in grid.seeds}
    states = dict.fromkeys(needs, State.waiting)
    for task in needs:
        if data.draw(st.booleans()) and all(states[other] is State.finished for other in _all_needs(needs, task)):
            states[task] = State.finished  # by an earlier command
    begun: list[Task] = []
    num_processes = data.draw(st.integers(1, 3))
    while True:
        running = [task for task, state in states.items() if state is State.running]
        while len(running) < num_processes and (task := next_task(needs, states)):
            needed = needs[task]
            assert needed is None or states[needed] is State.finished
            assert task not in begun
            states[task] = State.running
            begun.append(task)
            running.append(task)
        for task in blocked_tasks(needs, states):
            assert any(states[other] is State.failed for other in _all_needs(needs, task))
            states[task] = State.failed
        if not running:
            break
        states[data.draw(st.sampled_from(running))] = data.draw(st.sampled_from([State.finished, State.failed]))
    assert State.waiting not in states.values()


def _all_needs(needs: Any, task: Task) -> list[Task]:
    found, needed = [], needs[task]
    while needed is not None:
        found.append(needed)
        needed = needs[needed]
    return found


def test_what_another_process_trains_is_passed_over():
    needs = {Task("a", 0): None, Task("b", 0): None}
    states = dict.fromkeys(needs, State.waiting)
    assert next_task(needs, states, busy={Task("a", 0)}) == Task("b", 0)
    assert next_task(needs, states, busy=set(needs)) is None


@given(st.integers(0, 8), st.integers(1, 4), st.integers(0, 8))
def test_processes_share_devices_only_where_there_are_too_few(slots: int, num_ranks: int, count: int):
    devices = [str(number) for number in range(count)]
    given_ = [devices_of(slot, num_ranks=num_ranks, devices=devices) for slot in range(slots)]
    used = [device for each in given_ for device in each]
    assert all(len(each) == min(num_ranks, count) for each in given_) or count == 1
    if slots * num_ranks <= count:
        assert len(set(used)) == len(used)
