"""The text of job scripts: launch/slurm holds what `sbatch_text` writes, and no name breaks out of it."""

import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from iccld.cli import main
from iccld.programs.submit.work import jobs_of
from iccld.slurm.config import Container, Launcher, SubmitConfig, Variant, Work, seconds_of
from iccld.slurm.history import failing_nodes, lead_time_s
from iccld.slurm.script import sbatch_text
from iccld.slurm.settings_file import read_settings

ROOT = Path(__file__).parents[2]
WORK = Work(
    run_dir="/shared/runs/gta5",
    code="/shared/iccld",
    folder="/shared",
    arguments=("train", "experiment=gta5_to_cityscapes", "run_dir=/shared/runs/gta5"),
)
GPUS = SubmitConfig(job_name="gta5", account="vision", partition="gpu", gpus_per_node=4, memory="200G", time="4:00:00")
ARRAY = replace(
    WORK,
    arguments=(),
    variants=tuple(
        Variant(
            f"/shared/runs/gta5/{name}",
            ("train", "experiment=gta5_to_cityscapes", *settings, f"run_dir=/shared/runs/gta5/{name}"),
        )
        for name, settings in (
            ("full_seed_0", ["seed=0"]),
            ("full_seed_1", ["seed=1"]),
            ("no_teacher_seed_0", ["stage1.objective.use_teacher=false", "seed=0"]),
        )
    ),
)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
APPTAINER = replace(
    GPUS,
    nodes=2,
    container=Container.apptainer,
    image="/shared/iccld.sif",
    mounts=("/data:/data:ro",),
    python="python3",
)
TEMPLATES = {
    "one_node": (replace(GPUS, modules=("cuda/12.8",)), WORK),
    "several_nodes": (replace(GPUS, nodes=4, constraint="a100&ib", exclude=("n07",)), replace(WORK, variables=FSDP2)),
    "array": (replace(GPUS, max_running=2), ARRAY),
    "apptainer": (APPTAINER, WORK),
    "enroot": (replace(APPTAINER, container=Container.enroot, image="/shared/iccld.sqsh"), WORK),
    "accelerate": (
        replace(GPUS, nodes=2, launcher=Launcher.accelerate),
        replace(WORK, engine_file="/shared/iccld/accelerate_configs/zero2.yaml"),
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_what_would_be_submitted(name: str):
    template = (ROOT / "launch" / "slurm" / f"{name}.sbatch").read_text()
    about, _, script = template.partition("\n#SBATCH")
    assert sbatch_text(*TEMPLATES[name]) == f"#!/bin/bash\n#SBATCH{script}"
    assert about.startswith("#!/bin/bash\n# ") and all(line.startswith("#") for line in about.splitlines())


def test_every_template_is_tested():
    assert {path.stem for path in (ROOT / "launch" / "slurm").glob("*.sbatch")} == set(TEMPLATES)


HOSTILE = ["a b", "a'b", 'a"b', "a;touch x", "a$(touch x)", "a`touch x`", "a#b", "a&b|c", "*", "ä", "a%jb", "--a"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_words_reach_the_program_as_they_are(tmp_path: Path, name: str):
    """The script itself is run, with `launch` in place of SLURM printing what it was given."""
    folder = tmp_path / name
    (folder / "iccld" / "slurm").mkdir(parents=True)
    (folder / "iccld" / "slurm" / "job.sh").write_text(
        "begin_attempt() { printf '%s\\0' \"$1\"; }\nend_attempt() { :; }\nlaunch() { printf '%s\\0' \"$@\"; }\n"
    )
    words = ("train", f"a={name}", name)
    work = Work(run_dir=f"{folder}/run", code=str(folder), folder=str(folder), arguments=words)
    script = tmp_path / "script"
    script.write_text(sbatch_text(SubmitConfig(), work))
    done = subprocess.run(
        ["bash", "-u", str(script)], capture_output=True, cwd=tmp_path, timeout=20, check=True,
        env={"SLURM_CPUS_PER_TASK": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    given = done.stdout.decode().split("\0")[:-1]
    assert given[0] == f"{folder}/run" and tuple(given[-3:]) == words
    assert not (tmp_path / "x").exists()
    [output] = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --output=")]
    log = f"{folder}/run/logs/%x-%j.log".replace(name, name.replace("%", "%%"))
    assert shlex.split(output.removeprefix("#SBATCH ")) == [f"--output={log}"]


@pytest.mark.parametrize("setting", ["job_name", "account", "partition", "qos", "memory", "time", "constraint"])
@pytest.mark.parametrize("value", ["a b", "a;b", "a'b", 'a"b', "a\n#SBATCH --uid=0", "a#b", "$(x)"])
def test_hostile_names_in_directives_are_refused(setting: str, value: str):
    with pytest.raises(ValueError, match=f"^{setting}="):
        SubmitConfig(**{setting: value})


@pytest.mark.parametrize("setting", ["exclude", "after", "mounts", "modules", "directives", "setup"])
def test_lists_take_no_line_breaks(setting: str):
    with pytest.raises(ValueError, match=f"^{setting}="):
        SubmitConfig(**{setting: ("a\nb",)})


@pytest.mark.parametrize("where", ["run_dir", "code", "folder", "arguments"])
def test_work_takes_no_line_breaks(where: str):
    with pytest.raises(ValueError, match="line break"):
        replace(WORK, **{where: ("a\nb",) if where == "arguments" else "/a\nb"})


def test_a_run_directory_takes_no_colon():
    with pytest.raises(ValueError, match="without colons"):
        replace(WORK, run_dir="/a:b")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("time: 90", 'time=90 must be quoted, as in time: "90"'),
        ("account: 123", "account=123 must be quoted"),
        ("nodes: '2'", "nodes='2' must be a whole number, without quotes"),
        ("nodes: true", "nodes=True must be a whole number"),
        ("requeue: 'no'", "requeue='no' must be true or false"),
        ("launcher: torchrun", "launcher='torchrun' must be one of srun, accelerate"),
        ("exclude: {a: b}", "must be a list of words"),
        ("exclude: [1.5]", "must be a list of words"),
        ("partition:", "partition=None must be quoted"),
        ("nods: 2", "nods; known are"),
        ("- nodes", "no settings; known are"),
        ("a: b: c", "mapping values are not allowed here"),
        ("nodes: 1\nnodes: 2", ":2: names 'nodes' twice"),
    ],
)
def test_settings_of_another_type_are_refused_in_a_line(tmp_path: Path, line: str, message: str):
    (path := tmp_path / "cluster.yaml").write_text(line + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_settings(path)
    assert "\n" not in str(error.value)


def test_settings_are_read_as_what_they_are(tmp_path: Path):
    (path := tmp_path / "cluster.yaml").write_text(
        "exclude: n01\nafter: 4711\nmodules: [cuda, gcc]\nrequeue: false\nlauncher: accelerate\ntime: 4:00:00\n"
    )
    assert read_settings(path) == {
        "exclude": ("n01",), "after": ("4711",), "modules": ("cuda", "gcc"), "requeue": False,
        "launcher": Launcher.accelerate, "time": "4:00:00",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": 0}, "nodes=0 must be at least 1"),
        ({"lead_s": 300, "time": "5"}, "twice lead_s"),
        ({"container": Container.apptainer}, "need each other"),
        ({"image": "a.sif", "container": Container.enroot, "launcher": Launcher.accelerate}, "use launcher=srun"),
    ],
)
def test_what_does_not_fit_together_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        SubmitConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("time", "seconds"), [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-0:30:00", 88200)]
)
def test_times_are_read_as_slurm_does(time: str, seconds: int):
    assert seconds_of(time) == seconds


def test_the_lead_time_follows_the_longest_save(tmp_path: Path):
    assert lead_time_s(tmp_path) == 300
    for step, seconds in ((1, 10.0), (2, 40.0)):
        folder = tmp_path / "stage1" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(f'{{"save_s": {seconds}}}')
    (tmp_path / "metrics.jsonl").write_text('{"step_s": 5.0}\n{"step_')
    assert lead_time_s(tmp_path) == 60 + 3 * 40 + 2 * 5


def test_a_node_is_left_out_after_two_attempts_that_it_ended(tmp_path: Path):
    (tmp_path / "slurm").mkdir()
    ledger = tmp_path / "slurm" / "failed_nodes"
    ledger.write_text(
        "n1\tnow\tjob 1, restart 0\tx\nn1\tnow\tjob 1, restart 0\tx\nn2\tnow\tjob 1, restart 0\tx\n\nn1\n"
    )
    assert failing_nodes(tmp_path) == []
    ledger.write_text(ledger.read_text() + "n2\tnow\tjob 1, restart 1\tx\n")
    assert failing_nodes(tmp_path) == ["n2"]


TRAIN = ["train", "model=tiny", "dataset=scenes", "run_dir=runs/a b", "stage1.trainer.micro_batch_size=1"]


@pytest.mark.parametrize("between", [[], ["--"], ["--nodes", "2"]])
def test_a_verb_ends_the_settings_of_the_last_variant(
    tmp_path: Path, between: list[str], capsys: pytest.CaptureFixture[str]
):
    variants = ["--variant", "full", "--variant", "no_teacher", "stage1.objective.use_teacher=false"]
    train = ["train", "model=tiny", "dataset=scenes", f"run_dir={tmp_path}", "stage1.trainer.global_batch_size=4"]
    assert main(["submit", "--dry-run", *variants, *between, *train]) == 0
    script = capsys.readouterr().out
    assert "--array=0-1\n" in script and f"run_dir={tmp_path}/no_teacher command=(train model=tiny" in script


def test_a_script_that_is_shown_is_a_script_also_where_nodes_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "failed_nodes").write_text("".join(f"n2\tnow\tjob 1, restart {i}\tx\n" for i in range(2)))
    assert main(["submit", "--dry-run", "train", "model=tiny", "dataset=scenes", f"run_dir={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash\n") and "#SBATCH --exclude=n2\n" in said.out and "not on n2" in said.err


def test_seeds_and_variants_multiply():
    [(_, work)] = jobs_of(
        TRAIN, num_ranks=1, seeds="2", variants=[("x", ["seed=9", "statistics_samples=4"]), ("y", [])]
    )
    assert [Path(variant.run_dir).name for variant in work.variants] == ["x_seed_0", "x_seed_1", "y_seed_0", "y_seed_1"]
    last = work.variants[1].arguments
    assert [word for word in last if word.startswith("seed=")] == ["seed=9", "seed=1"]
    assert [word for word in last if word.startswith("run_dir=")] == [f"run_dir={Path('runs/a b').absolute()}/x_seed_1"]


def test_a_chain_is_a_job_a_stage_and_one_for_the_scores():
    names, works = zip(*jobs_of(TRAIN, num_ranks=1, chain=True), strict=True)
    assert names == ("-stage1", "-stage2", "-scores")
    assert "stages=[stage1]" in works[0].arguments and "data.validation.shards=" in works[0].arguments
    assert list(works[2].arguments) == TRAIN


def test_a_chain_that_is_refused_on_the_way_names_the_jobs_that_wait_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (sbatch := tmp_path / "sbatch").write_text("""#!/bin/sh
case "$2" in *-scores.sbatch) echo "Job violates\nQOS" >&2; exit 1;; *stage2*) echo "12;cluster";; *) echo 7;; esac
""")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["submit", "--chain", "train", "model=tiny", "dataset=scenes", f"run_dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("Job violates QOS; the jobs before it are submitted; to cancel them: scancel 7 12\n")
    assert error.count("\n") == 1


SUBMIT = ["submit", "--time", "4:00:00", "--account", "a", "train", "model=tiny", "dataset=scenes"]


def sbatch_that(says: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sbatch").write_text(f"#!/bin/sh\nenv >{folder}/environment\n{says}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_what_a_site_s_sbatch_says_beside_the_number_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sbatch_that(
        "echo '*** Maintenance on 12 May ***'; echo '4711;c2'; echo 'moved to scavenger' >&2", tmp_path, monkeypatch
    )
    assert main([*SUBMIT, f"run_dir={tmp_path}/run"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("job 4711: run, log ") and "sbatch: moved to scavenger\n" in said.err


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1", "look with squeue"),
        ("echo 'thank you'", "thank you (look with squeue: the job may have arrived)"),
    ],
)
def test_a_job_that_may_have_been_submitted_is_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], says: str, message: str
):
    sbatch_that(says, tmp_path, monkeypatch)
    assert main([*SUBMIT, f"run_dir={tmp_path}/run"]) == 2
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_no_variable_overrules_the_script_or_is_of_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sbatch_that("echo 7", tmp_path, monkeypatch)
    overruling = ("ACCOUNT", "TIMELIMIT", "SIGNAL", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "ERROR", "WAIT")
    for name in (*(f"SBATCH_{name}" for name in overruling), "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
    for name in ("SLURM_JOB_ID", "SLURM_CONF", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "kept")
    assert main([*SUBMIT, f"run_dir={tmp_path}/run"]) == 0
    lines = (tmp_path / "environment").read_text().splitlines()
    assert sorted(line for line in lines if line.startswith(("SBATCH_", "SLURM_"))) == [
        "SBATCH_PARTITION=kept",
        "SLURM_CONF=kept",
    ]


def test_directives_are_as_sites_have_them():
    config = SubmitConfig(
        gpus_per_node=4, gpu_type="h100", exclude=("n1,gpu[02-05]", "rack1[1-2]n[0-9]"),
        directives=("--comment=two words", "--licenses=lustre*2", "--prefer=a&b", "--exclusive"),
    )  # fmt: skip
    text = sbatch_text(config, WORK)
    for line in (
        "--gres=gpu:h100:4", "--exclude=n1,gpu[02-05],rack1[1-2]n[0-9]", '--comment="two words"',
        "--licenses=lustre*2", "--prefer=a&b", "--exclusive",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text


@pytest.mark.parametrize(
    ("line", "failed"),
    [
        ("source ./env.sh", ""),
        ("source ./other.sh", "source ./other.sh"),
        (". $HOME/other.sh", ". $HOME/other.sh"),
        ("source env.sh", ""),  # which bash looks for in PATH, too
        ("source ./other.sh || true", ""),
        ("conda activate a", "conda activate a"),
        ("false", ""),
    ],
)
def test_a_line_of_the_setup_that_fails_is_known_where_that_is_plain(tmp_path: Path, line: str, failed: str):
    """A file that is sourced may end with a status that says nothing."""
    (tmp_path / "env.sh").write_text("echo sourced\nfalse\n")
    text = sbatch_text(SubmitConfig(setup=(line,)), WORK).partition("unset SLURM")[0] + 'echo "$failed_setup"\n'
    done = subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ("sourced\n" if "env.sh" in line else "") + f"{failed}\n"


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["train", "sed=1"], {}, "sed"),
        (["predict", "x"], {}, "cannot be submitted"),
        ([], {}, "cannot be submitted"),
        (TRAIN, {"num_ranks": 3}, "micro_batch_size"),
        (TRAIN, {"seeds": "0"}, "--seeds 0"),
        (TRAIN, {"variants": [("../x", [])]}, "names a folder"),
        (TRAIN, {"variants": [("x", ["seed=1"]), ("y", []), ("x", ["seed=2"])]}, "x twice"),
        (TRAIN, {"seeds": "5,0,5"}, "seed_5 twice"),
        (["evaluate", "runs/a"], {"chain": True}, "are of `train`"),
    ],
)
def test_what_the_job_would_refuse_is_refused_before_it_waits(words: list[str], options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        jobs_of(words, **{"num_ranks": 1, **options})


def test_an_engine_of_another_precision_than_the_run_s_is_refused_before_it_waits(tmp_path: Path):
    (path := tmp_path / "engine.yaml").write_text("distributed_type: MULTI_GPU\nmixed_precision: bf16\n")
    with pytest.raises(ValueError, match=r"mixed_precision=bf16 .* must be engine\.precision=fp32"):
        jobs_of(TRAIN, num_ranks=1, engine=str(path))
    assert jobs_of([*TRAIN, "engine.precision=bf16"], num_ranks=1, engine=str(path))


def test_a_lead_that_leaves_no_time_for_a_save_is_named(capsys: pytest.CaptureFixture[str]):
    train = ["train", "model=tiny", "dataset=scenes", "run_dir=nowhere"]
    for words, least in (([], 8), (["preemption.debounce_s=9.5"], 20)):
        command = ["submit", "--dry-run", "--lead-s"]
        assert main([*command, str(least - 1), *train, *words]) == 2
        assert f"lead_s={least - 1} leaves" in (said := capsys.readouterr().err)
        assert f"use --lead-s {least} at least" in said and "grace_s" not in said
        assert main([*command, str(least), *train, *words]) == 0
        capsys.readouterr()
    assert main([*command, "5", *train, "preemption.grace_s=4"]) == 0
