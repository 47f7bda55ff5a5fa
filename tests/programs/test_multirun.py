"""`train --multirun`: a run for each value, each in a folder of its own; one that fails names itself."""

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from iccld.cli import main
from iccld.config import load_config, to_yaml
from iccld.programs.run.child import run_child
from iccld.programs.train import multirun
from iccld.programs.train.sweep import jobs_of, name_of
from iccld.runtime.faults.lock import locked
from tests.factory import scene_overrides

PLAIN = ["model=tiny", "dataset=scenes", "run_dir=runs/a,b ${x}"]


def test_each_combination_is_a_run_with_its_words_to_the_letter():
    source = "data.source.shards=/a,b/${c} 'd'"
    jobs = jobs_of([*PLAIN, source, "seed=0,1", "stage=source_only,all", "hydra/launcher=basic"])
    assert [job.name for job in jobs] == [
        f"seed_{seed}_stage_{stage}" for seed in (0, 1) for stage in ("source_only", "all")
    ]
    first = jobs[0]
    assert first.run_dir == "runs/a,b ${x}/seed_0_stage_source_only" and first.stages == ("stage1",)
    assert first.words == (*PLAIN[:2], source, "seed=0", "stage=source_only", f"run_dir={first.run_dir}")
    config = load_config(first.words)
    assert (config.run_dir, config.data.source.shards) == (first.run_dir, source.partition("=")[2])


def test_names_do_not_depend_on_the_other_values_and_are_never_the_same():
    assert name_of(["seed=1"]) == "seed_1"
    assert name_of(["stage1.trainer.num_steps=1", "stage2.trainer.num_steps=2"]) == (
        "stage1.trainer.num_steps_1_stage2.trainer.num_steps_2"
    )
    lists = [name_of([f"data.crop_size=[{sides}]"]) for sides in ("48,64", "48.64", "4,864")]
    assert len(set(lists)) == 3 and all("/" not in name and "[" not in name for name in lists)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=0"], "give one several, as in seed=0,1,2"),
        (["seed=0,0"], "seed=0,0 gives a value twice"),
        (["stage1.trainer.num_steps=1,0"], "stage1.trainer.num_steps=0 must be at least 1"),
        (["sed=0,1"], "did you mean seed?"),
        (["stage=glob(*)"], "its values must be told"),
        (["seed=range(0,2000)"], "would train 2000 runs"),
        (["seed=0,1", "data.source.shards=https://user:hunter22@host/x"], "holds a secret"),
    ],
)
def test_what_cannot_be_is_refused_before_any_run(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--multirun", *PLAIN, *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and "hunter22" not in lines[0], lines


def test_several_values_without_multirun_name_it(capsys: pytest.CaptureFixture[str]):
    assert main(["train", *PLAIN, "seed=0,1"]) == 2
    assert "`iccld train --multirun` trains a run for each value" in capsys.readouterr().err
    assert main(["train", *PLAIN, "--ranks", "2"]) == 2
    assert "iccld launch 2 train" in capsys.readouterr().err
    assert main(["submit", "--dry-run", "train", "--multirun", *PLAIN, "seed=0,1"]) == 2
    assert "--variant or --seeds" in capsys.readouterr().err


class Trainings:
    """Stands in for the processes: what each ends with, by the name of its run."""

    def __init__(self, ends: dict[str, tuple[int, int]]) -> None:
        self.ends, self.commands = ends, list[list[str]]()

    def __call__(self, command: Sequence[str]) -> tuple[int, int]:
        self.commands.append(list(command))
        run_dir = Path(command[-1].partition("=")[2])
        end = self.ends.get(run_dir.name, (0, 0))
        if end == (0, 0):
            (run_dir / "stage1/final").mkdir(parents=True)
        return end


def sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Sequence[str], **ends: tuple[int, int]
) -> tuple[int, Trainings]:
    trainings = Trainings(ends)
    monkeypatch.setattr(multirun, "run_child", trainings)
    own = [*PLAIN[:2], "stages=[stage1]", f"run_dir={tmp_path}/a,b c", "seed=0,1,2"]
    return main(["train", "--multirun", *words, *own]), trainings


def test_all_runs_are_trained_by_the_launcher_of_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    secrets = tmp_path / "secrets"
    secrets.write_text("")
    secrets.chmod(0o600)
    status, trainings = sweep(tmp_path, monkeypatch, [f"--secrets={secrets}", "--ranks=2", "--extend"])
    assert status == 0
    assert [command[-1] for command in trainings.commands] == [
        f"run_dir={tmp_path}/a,b c/seed_{seed}" for seed in (0, 1, 2)
    ]
    begin = [sys.executable, "-m", "iccld", "launch", "2", "train", f"--secrets={secrets}", "--extend", *PLAIN[:2]]
    assert trainings.commands[0][: len(begin)] == begin
    found = {path.name for path in (tmp_path / "a,b c/.hydra").iterdir()}
    assert found == {"lock", "multirun.yaml", "seed_0.status", "seed_1.status", "seed_2.status"}
    assert "scenes" not in (tmp_path / "a,b c/.hydra/multirun.yaml").read_text(), "Hydra knows no setting of a run"


@pytest.mark.parametrize(("end", "status"), [((2, 0), 2), ((75, 0), 75), ((-9, 0), 75), ((1, 0), 1), ((0, 99), 227)])
def test_a_run_that_fails_names_itself_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    end: tuple[int, int], status: int,
):  # fmt: skip
    if end == (0, 99):
        end, status = (0, signal.SIGINT), 130
    found, trainings = sweep(tmp_path, monkeypatch, [], seed_1=end)
    said = capsys.readouterr()
    assert found == status and len(trainings.commands) == (2 if end[1] else 3)
    assert f"seed_1: {'stopped before stage1 was finished' if end[0] == 0 else ''}" in said.err
    assert "seed_0: finished" in said.out and f"its run is {tmp_path}/a,b c/seed_1" in said.err
    assert ("seed_2: did not run to its end" in said.err) == bool(end[1])


def test_a_folder_whose_runs_another_command_trains_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert sweep(tmp_path, monkeypatch, [])[0] == 0
    status = tmp_path / "a,b c/.hydra/seed_0.status"
    with locked(status.parent):
        found, trainings = sweep(tmp_path, monkeypatch, [])
    said = capsys.readouterr().err
    assert found == 2 and not trainings.commands and status.is_file()
    assert f"run_dir={tmp_path}/a,b c is in use by process {os.getpid()}" in said and len(said.splitlines()) == 1


def test_a_run_that_was_stopped_is_not_one_that_failed_whatever_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert sweep(tmp_path, monkeypatch, ["preemption.exit_status=85"], seed_1=(85, 0))[0] == 75
    assert "seed_1: stopped before stage1 was finished" in capsys.readouterr().err


def test_a_run_that_was_stopped_in_its_scoring_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for seed in (0, 1, 2):
        run_dir = tmp_path / f"a,b c/seed_{seed}"
        validation = "" if seed == 2 else "/validation"
        (run_dir / "stage1/final/teacher").mkdir(parents=True)
        config = load_config([*PLAIN[:2], f"data.validation.shards={validation}"])
        (run_dir / "config.yaml").write_text(to_yaml(config))
    scores = tmp_path / "a,b c/seed_0/report/results.json"
    scores.parent.mkdir()
    scores.write_text('{"about": {}, "stage1": {}}')
    monkeypatch.setattr(Trainings, "__call__", lambda *_: (0, 0))
    assert sweep(tmp_path, monkeypatch, [])[0] == 75
    said = capsys.readouterr()
    assert "seed_1: stopped before the final scoring was finished; its run is" in said.err
    assert "seed_0: finished" in said.out and "seed_2: finished" in said.out and "1 of 3 runs" in said.err


def test_a_launcher_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    status, trainings = sweep(tmp_path, monkeypatch, ["hydra/launcher=submitit_none"])
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and not trainings.commands and len(lines) == 1
    assert "Could not find 'hydra/launcher/submitit_none'" in lines[0] and "iccld[slurm]" in lines[0]


CHILD = """
import os, signal, sys, time
from pathlib import Path
def stop(*_):
    Path(sys.argv[1]).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getpid(), signal.SIGUSR2)  # as all processes of a job get it
Path(sys.argv[1] + ".ready").touch()
time.sleep(30)
"""


def test_submitit_requeues_a_job_once_its_training_has_saved(tmp_path: Path):
    saved, heard = tmp_path / "saved", list[bool]()

    def when_ready() -> None:
        while not Path(f"{saved}.ready").exists():
            pass
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append(saved.exists()))
    threading.Thread(target=when_ready, daemon=True).start()
    try:
        assert run_child([sys.executable, "-c", CHILD, str(saved)]) == (0, signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [True]


def test_a_job_of_slurm_is_queued_again_as_often_as_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[list[str]] = []
    monkeypatch.setattr(multirun.hydra, "main", lambda **_: lambda task: lambda: lines.append(list(sys.argv)))
    of_user = "hydra.launcher.max_num_timeout=2"
    for words in ([], [multirun.OF_SLURM], [multirun.OF_SLURM, of_user]):
        multirun._sweep(lambda config: None, 2, tmp_path, words)
    found = [[word for word in line if "max_num_timeout" in word] for line in lines]
    assert found == [[], ["hydra.launcher.max_num_timeout=100"], ["hydra.launcher.max_num_timeout=100", of_user]]


def quick(shards: Path, run_dir: Path) -> list[str]:
    more = ["stages=[stage1]", "stage1.trainer.num_steps=2", "evaluation.diagnostic_images=0", "seed=0,1"]
    return [*scene_overrides(shards, run_dir), *more]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_real_runs(scene_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], launcher: str):
    """One of them belongs to another config: it fails, the other is trained; mended, the same command goes on."""
    if launcher != "basic":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = ["train", "--multirun", *quick(scene_shards, tmp_path / "sweep"), f"hydra/launcher={launcher}"]
    wrong = tmp_path / "sweep/seed_1"
    (wrong / "stage1").mkdir(parents=True)
    (wrong / "config.yaml").write_text("seed: 7\n")
    assert main(command) == 2
    assert "iccld train: seed_1: failed with exit status 2" in capfd.readouterr().err
    final = tmp_path / "sweep/seed_0/stage1/final/teacher/model.safetensors"
    trained = final.stat().st_mtime_ns
    (wrong / "config.yaml").unlink()
    assert main(command) == 0 and final.stat().st_mtime_ns == trained
    capfd.readouterr()
    assert main(["runs", str(tmp_path / "sweep")]) == 0
    table = capfd.readouterr().out
    assert "seed_0" in table and "seed=1" in table and table.count("finished") == 2
    assert main(["compare", str(tmp_path / "sweep/seed_0"), str(wrong)]) == 0
    assert json.loads((wrong / "report/results.json").read_text())["stage1"]["miou"] is not None
