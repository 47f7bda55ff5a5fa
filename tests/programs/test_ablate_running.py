"""The processes of `iccld ablate`, with stand-ins for the trainings: who is begun, stopped, waited for and named."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from iccld.cli import main
from iccld.config import to_yaml
from iccld.programs.ablate.grid import Grid, merged, parse_grid
from iccld.programs.ablate.rows import NOTE_NAME, Ablation, changes, open_ablation, refuse_changes
from iccld.programs.ablate.running import Ending, Trainings, train_rows
from iccld.programs.ablate.summary import figures_of
from iccld.programs.ablate.tasks import State, Task
from iccld.programs.run.child import signals_noted

STAND_IN = """
import json, signal, sys, time
from pathlib import Path
run_dir, kind = Path(sys.argv[1]), sys.argv[2]
with (run_dir / "starts").open("a") as file: file.write("x")
def finish():
    (run_dir / "stage1/final/teacher").mkdir(parents=True)
    (run_dir / "report").mkdir()
    (run_dir / "config.yaml").write_text(sys.argv[3])
    (run_dir / "report/results.json").write_text(json.dumps({"stage1": {"miou": 1.0}}))
def stop(*_):
    (run_dir / "saved").touch()
    sys.exit(0)
print("line of", kind, flush=True)
if kind == "slow":
    signal.signal(signal.SIGTERM, stop)
    (run_dir / "ready").touch()
    while not (run_dir / "go").exists(): time.sleep(0.02)
if kind.startswith("status"):
    print("the last words\\x1b[2J", flush=True)
    sys.exit(int(kind.removeprefix("status")))
finish()
"""


@dataclass(frozen=True)
class StandIn(Ablation):
    """Rows are called after what their process does."""

    def process_words(self, task: Task) -> list[str]:
        kind, settings = task.name.partition("-")[0], to_yaml(self.config(task))
        return [sys.executable, "-c", STAND_IN, str(self.run_dir(task)), kind, settings]


def grid_of(runs: dict[str, str], *, seeds: list[int]) -> Grid:
    """Rows, and the row whose stage 1 each one's starts from."""
    common = ["model=tiny", "dataset=scenes", "stage=segmentation"]
    rows = {name: {"initial": needed} for name, needed in runs.items()}
    return parse_grid({"baseline": next(iter(runs)), "seeds": seeds, "common": common, "runs": rows}, where="grid")


def stand_in(folder: Path, runs: dict[str, str], *, seeds: list[int]) -> StandIn:
    real = open_ablation(grid_of(runs, seeds=seeds), folder, num_ranks=1)
    return StandIn(real.grid, real.folder, real.num_ranks, real.configs)


def starts(ablation: Ablation, task: Task) -> int:
    path = ablation.run_dir(task) / "starts"
    return len(path.read_text()) if path.exists() else 0


def test_a_row_that_fails_is_named_with_the_end_of_its_log_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    runs = {"fine": "", "status3": "", "fine-after": "status3", "fine-too": "fine", "fine-last": "fine-after"}
    ablation = stand_in(tmp_path, runs, seeds=[0])
    ending = train_rows(ablation, num_processes=2)
    said = capsys.readouterr().out
    assert ending.status == 1
    assert {str(task) for task in ending.failures} == {"status3/seed_0", "fine-after/seed_0", "fine-last/seed_0"}
    assert "status3/seed_0: failed with exit status 3" in said and "    the last words [2J\n" in said
    assert "fine-after/seed_0: not begun, since status3/seed_0 is not finished" in said
    assert [starts(ablation, Task(name, 0)) for name in runs] == [1, 1, 0, 1, 0]
    again = train_rows(ablation, num_processes=2)
    assert again.status == 1 and [starts(ablation, Task(name, 0)) for name in runs] == [1, 2, 0, 1, 0]


@pytest.mark.parametrize("kind", ["status75", "status76", "status2", "status1", "fine"])
def test_the_exit_status_says_who_must_act(tmp_path: Path, kind: str):
    status = {"status75": 75, "status76": 75, "status2": 2, "status1": 1, "fine": 0}[kind]
    assert train_rows(stand_in(tmp_path, {kind: ""}, seeds=[0]), num_processes=1).status == status


def test_a_run_that_was_stopped_from_outside_is_not_one_that_failed_whatever_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ablation = stand_in(tmp_path, {"status85": ""}, seeds=[0])
    assert train_rows(ablation, num_processes=1).status == 1
    ablation.configs["status85"].preemption.exit_status = 85
    assert train_rows(ablation, num_processes=1).status == 75
    assert "was stopped from outside before it was finished" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"stage1": 5}'])
def test_a_row_whose_scores_are_damaged_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
):
    ablation = stand_in(tmp_path, {"fine": "", "fine-b": "", "fine-c": "fine"}, seeds=[0])
    damaged = ablation.run_dir(Task("fine", 0)) / "report/results.json"
    collect = Trainings.collect

    def damage(trainings: Trainings) -> None:
        if any(task.name == "fine" and each.process.poll() is not None for task, each in trainings._running.items()):
            damaged.write_text(text)
        collect(trainings)

    monkeypatch.setattr(Trainings, "collect", damage)
    ending = train_rows(ablation, num_processes=2)
    assert ending.failures == {Task("fine", 0): 2, Task("fine-c", 0): 2}
    said = capsys.readouterr().out
    assert f"fine/seed_0: is not finished: {damaged} holds no scores" in said
    assert figures_of(ablation)["fine"].missing == [0] and f"{damaged} holds no scores" in capsys.readouterr().out
    assert [starts(ablation, Task(name, 0)) for name in ablation.grid.rows] == [1, 1, 0]
    monkeypatch.undo()
    assert train_rows(ablation, num_processes=2).failures == ending.failures
    assert f"fine/seed_0: cannot begin: {damaged} holds no scores" in capsys.readouterr().out


def test_an_error_of_our_own_leaves_no_run_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ablation = stand_in(tmp_path, {"slow": ""}, seeds=[0])
    run_dir = ablation.run_dir(Task("slow", 0))

    def collect(trainings: Trainings) -> None:
        if (run_dir / "ready").exists():
            raise BrokenPipeError

    monkeypatch.setattr(Trainings, "collect", collect)
    with pytest.raises(BrokenPipeError):
        train_rows(ablation, num_processes=1)
    assert (run_dir / "saved").exists()


def test_one_failure_that_the_user_must_mend_outweighs_those_of_the_world():
    failures = {Task("a", 0): 75, Task("b", 0): 2}
    assert Ending({}, failures).status == 2 and Ending({}, failures, signal=15).status == 143


def test_as_many_run_at_a_time_as_there_are_processes(tmp_path: Path):
    ablation = stand_in(tmp_path, {"slow": "", "slow-b": "", "slow-c": ""}, seeds=[0])
    seen: list[int] = []

    def release() -> None:
        while not all((ablation.run_dir(Task(name, 0)) / "go").exists() for name in ablation.grid.rows):
            ready = sorted(tmp_path.glob("*/seed_0/ready"))
            open_ = [path for path in ready if not path.with_name("go").exists()]
            seen.append(len(open_))
            if len(open_) == 2 or len(ready) == 3:
                open_[0].with_name("go").touch()
            time.sleep(0.05)

    thread = threading.Thread(target=release)
    thread.start()
    assert train_rows(ablation, num_processes=2).status == 0
    thread.join()
    assert max(seen) == 2


def test_a_signal_stops_the_rows_in_order_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ablation = stand_in(tmp_path, {"slow": "", "fine": "slow"}, seeds=[0, 1])

    def ask() -> None:
        while len(list(tmp_path.glob("slow/*/ready"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    ending = train_rows(ablation, num_processes=2)
    assert ending.status == 128 + signal.SIGTERM and not ending.failures
    assert set(ending.states.values()) == {State.waiting}
    assert "SIGTERM: runs save and end (2)" in capsys.readouterr().out
    assert all((ablation.run_dir(Task("slow", seed)) / "saved").exists() for seed in (0, 1))
    for seed in (0, 1):
        (ablation.run_dir(Task("slow", seed)) / "go").touch()
    assert train_rows(ablation, num_processes=2).status == 0
    assert {name: starts(ablation, Task(name, 1)) for name in ablation.grid.rows} == {"slow": 2, "fine": 1}


def test_the_end_of_a_terminal_stops_the_rows_unless_nohup_keeps_it_away():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, heard in ((signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])):
            signal.signal(signal.SIGHUP, handler)
            with signals_noted() as came:
                os.kill(os.getpid(), signal.SIGHUP)
            assert came == heard and signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_of_a_launch_begins_no_grid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["ablate", "no_grid.yaml", "--output", "nowhere"]) == 2
    assert "use `iccld ablate --ranks R ...`" in capsys.readouterr().err


def test_a_run_that_outlived_its_command_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("iccld.programs.ablate.running.BUSY_S", 0.1)
    ablation = stand_in(tmp_path, {"fine": ""}, seeds=[0])
    run_dir = ablation.run_dir(Task("fine", 0))
    holder = (
        "import sys, time; from pathlib import Path; from iccld.runtime.faults.lock import locked\n"
        "folder = Path(sys.argv[1])\nwith locked(folder):\n"
        "    (folder / 'held').touch()\n"
        "    while not (folder / 'go').exists(): time.sleep(0.02)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(run_dir)])
    while not (run_dir / "held").exists():
        time.sleep(0.02)
    threading.Timer(1.0, (run_dir / "go").touch).start()
    assert train_rows(ablation, num_processes=1).status == 0
    assert process.wait() == 0
    said = capsys.readouterr().out
    assert f"fine/seed_0: is trained by process {process.pid}" in said and starts(ablation, Task("fine", 0)) == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("stage1.trainer.num_steps=7", "stage1.trainer.num_steps: 40000 -> 7"),
        ("stage=source_only", "stage1.objective.adapt: True -> False"),
        ("inference.num_steps=[2]", ""),  # of stage 2 alone, as the next two
        ("stage2.trainer.num_steps=7", ""),
        ("model.denoiser.width=8", ""),
        ("inference.weights=student", "weights: teacher -> student"),
        ("evaluation.max_images=3", "max_images: 0 -> 3"),
        ("evaluation.diagnostic_images=3", ""),
        ("metrics.log_every=7", ""),
        ("data.num_workers=1", ""),
    ],
)
def test_a_changed_entry_of_a_finished_row_is_refused_by_its_difference(tmp_path: Path, setting: str, words: str):
    ablation, task = stand_in(tmp_path, {"fine": ""}, seeds=[0]), Task("fine", 0)
    assert train_rows(ablation, num_processes=1).status == 0
    (ablation.run_dir(task) / "stage1/final/student").mkdir()
    results = (ablation.run_dir(task) / "report/results.json").read_text()
    (ablation.run_dir(task) / "report/results_student.json").write_text(results)
    grid = grid_of({"fine": ""}, seeds=[0])
    row = replace(grid.rows["fine"], settings=tuple(merged(grid.rows["fine"].settings, [setting])))
    changed = open_ablation(replace(grid, rows={"fine": row}), tmp_path, num_ranks=1)
    assert [change.partition(" -> ")[0] for change in changes(changed, task)] == (
        [words.partition(" -> ")[0]] * bool(words)
    )
    with pytest.raises(ValueError) if words else nullcontext() as caught:
        refuse_changes(changed, task)
    text = str(caught.value) if caught else ""
    assert words in text and "\n" not in text and ("another name" in text) == bool(words)


def test_of_a_row_with_stage_2_its_settings_count_and_those_of_the_stage_1_that_it_took_do_not(tmp_path: Path):
    values = {"baseline": "fine", "seeds": [0], "runs": {"fine": {}, "fine-b": {"after": "fine"}}}
    values["common"] = ["model=tiny", "dataset=scenes", "stage=segmentation"]

    def opened(*own: str, stage: str = "adversarial") -> StandIn:
        values["runs"]["fine-b"]["settings"] = [f"stage={stage}", *own]
        real = open_ablation(parse_grid(values, where="grid"), tmp_path, num_ranks=1)
        return StandIn(real.grid, real.folder, real.num_ranks, real.configs)

    task = Task("fine-b", 0)
    run_dir = opened().run_dir(task)
    assert train_rows(opened(), num_processes=1).failures == {task: 0}, "a stage 1 is not what it must train"
    (run_dir / "stage2/final/teacher").mkdir(parents=True)
    scores = {"stage1": {"miou": 1.0}, "stage2": {"1": {"miou": 1.0}}}
    (run_dir / "report/results.json").write_text(json.dumps(scores))
    assert not changes(opened("stage1.trainer.num_steps=7"), task)
    assert changes(opened("stage2.trainer.num_steps=7"), task) == ["stage2.trainer.num_steps: 40000 -> 7"]
    assert changes(opened("inference.num_steps=[2]"), task) == ["num_steps: [1, 4] -> [2]"]
    saved = replace(opened().config(task), stage1_from="runs/fine")
    (run_dir / "config.yaml").write_text(to_yaml(saved))
    assert not changes(opened(), task)
    del values["runs"]["fine-b"]["after"]
    found = changes(opened(stage="segmentation"), task)
    assert found[0] == "after: 'fine' -> ''" and "stage1_from: runs/fine -> " in found


def test_a_row_that_begins_from_another_run_than_before_is_refused(tmp_path: Path):
    ablation = stand_in(tmp_path, {"fine": "", "fine-b": "fine"}, seeds=[0])
    assert train_rows(ablation, num_processes=1).status == 0
    note = json.loads((ablation.run_dir(Task("fine-b", 0)) / NOTE_NAME).read_text())
    assert note["initial"] == "fine" and len(note["code"]) == 1
    changed = stand_in(tmp_path, {"fine": "", "fine-b": ""}, seeds=[0])
    with pytest.raises(ValueError, match=r"initial: 'fine' -> ''"):
        train_rows(changed, num_processes=1)


@pytest.mark.parametrize(
    ("settings", "row", "words"),
    [
        (["stage=segmentation"], {"after": "a"}, "trains no stage 2"),
        (["stage=all"], {"after": "a"}, "must not train; use stages=[stage2]"),
        (["stage=adversarial"], {}, "needs a stage 1; name the run"),
        (["data.validation.shards="], {}, "data.validation.shards is empty"),
        (["stage1.trainer.num_stepz=3"], {}, "num_stepz"),
        (["stage1.trainer.global_batch_size=3", "stage1.trainer.micro_batch_size=2"], {}, "global_batch_size=3"),
    ],
)
def test_settings_that_train_would_refuse_are_refused_before_anything_runs(settings, row, words):
    common = ["model=tiny", "dataset=scenes"]
    runs = {"a": {}, "b": {"settings": settings, **row}}
    grid = parse_grid({"baseline": "a", "seeds": [0], "common": common, "runs": runs}, where="grid")
    with pytest.raises(ValueError, match=r"runs\.b: ") as caught:
        open_ablation(grid, Path("nowhere"), num_ranks=1)
    assert words in str(caught.value)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("given", ["--processes 2", "--no-pictures", "--report-only"])
def test_what_has_no_effect_on_jobs_is_refused(capsys: pytest.CaptureFixture[str], given: str):
    words = ["ablate", "no_grid.yaml", "--output", "nowhere"]
    assert main([*words, "--slurm", "settings.yaml", *given.split()]) == 2
    error = capsys.readouterr().err
    assert f"{given} with --slurm: nothing is trained or reported here" in error and error.count("\n") == 1
    assert main([*words, *given.split()]) == 2 and "--slurm" not in capsys.readouterr().err
