"""A grid as job arrays: what waits for what, and what sbatch is given."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccld.programs.ablate.arrays import submit_rows
from iccld.programs.ablate.grid import Grid, Row, parse_grid
from iccld.programs.ablate.rows import open_ablation
from iccld.programs.ablate.tasks import State, arrays_of, tasks_of

SBATCH = """#!/bin/sh
for last; do :; done
cp "$last" "$JOBS/$(ls "$JOBS" | wc -l).sbatch"
echo "$((100 + $(ls "$JOBS" | wc -l)));cluster"
"""


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True))
    rows = {name: Row(name, (), after=draw(st.sampled_from(["", *names[:i]]))) for i, name in enumerate(names)}
    return Grid(names[0], tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))), rows)


@given(grids(), st.data())
def test_each_element_waits_for_the_element_of_the_same_place(grid: Grid, data: st.DataObject):
    needs = tasks_of(grid)
    states = {task: data.draw(st.sampled_from([State.finished, State.waiting])) for task in needs}
    arrays = arrays_of(needs, states)
    submitted = [task for array in arrays for task in array.tasks]
    assert len(set(submitted)) == len(submitted)
    assert {task for task, state in states.items() if state is not State.finished} <= set(submitted)
    for number, array in enumerate(arrays):
        assert array.after is None or array.after in arrays[:number]
        for place, task in enumerate(array.tasks):
            needed = needs[task]
            if array.after is not None:
                assert needed == array.after.tasks[place]
            else:
                assert needed is None or states[needed] is State.finished
    if all(state is State.finished for state in states.values()):
        assert not arrays


def test_sbatch_is_given_an_array_a_row_and_what_each_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("bin", "jobs"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(tmp_path / "jobs"))
    (tmp_path / "slurm.yaml").write_text('time: "4:00:00"\npartition: gpu\n')
    values = {
        "baseline": "first",
        "seeds": [0, 5],
        "common": ["model=tiny", "dataset=scenes"],
        "runs": {
            "first": {"settings": ["stage=segmentation"]},
            "second": {"after": "first", "settings": ["stage=adversarial"]},
            "alone": {"settings": ["stage=source_only"]},
        },
    }
    ablation = open_ablation(parse_grid(values, where="grid"), tmp_path / "out", num_ranks=1)
    assert submit_rows(ablation, settings=tmp_path / "slurm.yaml") == 0
    first, second, alone = (path.read_text() for path in sorted((tmp_path / "jobs").iterdir()))
    assert "--dependency" not in first + alone and "--dependency=aftercorr:101" in second
    assert all("--array=0-1\n" in text and "--partition=gpu" in text for text in (first, second, alone))
    assert f"stage1_from={tmp_path}/out/first/seed_5" in second and "stage1_from" not in first
    for seed in (0, 5):
        assert f"run_dir={tmp_path}/out/second/seed_{seed}" in second and f"seed={seed} " in second
        assert (tmp_path / f"out/second/seed_{seed}/ablation.json").is_file()
    assert "when the jobs are over: iccld ablate --report-only" in capsys.readouterr().out
