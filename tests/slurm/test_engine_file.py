"""Nothing in an engine's YAML becomes a command of the job script."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from iccld.slurm.config import Launcher, SubmitConfig, Work
from iccld.slurm.engine_file import engine_variables
from iccld.slurm.script import sbatch_text
from iccld.slurm.settings_file import read_settings
from tests.slurm.cluster import wait_until

HOSTILE = [
    "a; touch canary", "a\ntouch canary", "$(touch canary)", "`touch canary`", "x=1; touch canary #", "a b", "ä", "",
    "'; touch canary; '", "A B=1 touch", "fsdp_x\n", "fsdp_x;touch canary", "FSDP_X", "LD_PRELOAD", "${IFS}", "fsdp_x=",
]  # fmt: skip
KEYS = st.one_of(st.text(max_size=12), st.sampled_from(HOSTILE), st.from_regex(r"fsdp_[a-z0-9_]{1,8}", fullmatch=True))
VALUES = st.one_of(
    st.text(max_size=20), st.sampled_from(HOSTILE), st.integers(), st.booleans(), st.none(), st.floats(),
    st.lists(st.text(max_size=3), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=1),
)  # fmt: skip
JOB = "begin_attempt() { :; }\nend_attempt() { :; }\nlaunch() { env -0; }\n"


def run_script(folder: Path, work: Work, config: SubmitConfig) -> dict[str, str]:
    """The environment that ranks would be started in."""
    text = sbatch_text(config, work).replace('source "$code/iccld/slurm/job.sh"', JOB)
    (folder / "script").write_text(text)
    subprocess.run(["bash", "-n", "script"], cwd=folder, check=True, timeout=20)
    done = subprocess.run(
        ["bash", "-u", "script"], cwd=folder, capture_output=True, check=True, timeout=20,
        env={"PATH": "/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "1"},
    )  # fmt: skip
    pairs = [line.partition("=") for line in done.stdout.decode().split("\0") if line]
    return {name: value for name, _, value in pairs}


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=3), st.one_of(VALUES, st.sampled_from(["no", "bf16"])), VALUES)
@example({"x=1; touch canary #": 1}, "no", 1)
@example({"fsdp_a": "'; touch canary; '", "fsdp_b": "$(touch canary)"}, "bf16", 1)
def test_an_engine_s_words_are_words_or_refused(tmp_path: Path, fsdp: dict[str, Any], precision: Any, stage: Any):
    for values in (
        {"distributed_type": "FSDP", "fsdp_config": fsdp, "mixed_precision": precision},
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": stage}},
        {"distributed_type": stage},
    ):
        path = tmp_path / "engine.yaml"
        path.write_text(yaml.safe_dump(values, allow_unicode=False))
        try:
            variables = engine_variables(path)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        work = Work(
            run_dir=str(tmp_path), code=str(tmp_path), folder=str(tmp_path), arguments=("train",), variables=variables
        )
        given = run_script(tmp_path, work, SubmitConfig())
        assert not (tmp_path / "canary").exists()
        assert variables.items() <= given.items()


@pytest.mark.parametrize("name", ["a", "A B", "A;B", "", "1A", "A=1", "A\nB", "Ä"])
def test_a_variable_has_a_plain_name(name: str):
    with pytest.raises(ValueError, match="a variable's name"):
        Work(run_dir="/a", code="/a", folder="/a", variables={name: "1"})
    with pytest.raises(ValueError, match="control character"):
        Work(run_dir="/a", code="/a", folder="/a", variables={"A": "1\n2"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: DEEPSPED", "distributed_type='DEEPSPED' must be one of"),
        ("distributed_type: FSDP\nfsdp_config: 3", "fsdp_config=3 must be"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: [2]}", r"fsdp_version=\[2\] must be one word"),
        ("distributed_type: DEEPSPEED", "zero_stage=None must be one of"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: true}", "zero_stage=True must be one of"),
        ("distributed_type: FSDP\nmixed_precision: 16", "mixed_precision=16 must be one of"),
        ("distributed_type: FSDP\ndistributed_type: NO", ":2: names 'distributed_type' twice"),
        ("a: [", "engine.yaml:1: "),
        ("distributed_type: !!python/name:os.system", ":1: has a tag"),
    ],
)
def test_an_engine_s_file_is_read_strictly(text: str, message: str, tmp_path: Path):
    (path := tmp_path / "engine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        engine_variables(path)


def test_a_file_of_ones_own_may_have_aliases(tmp_path: Path):
    (path := tmp_path / "engine.yaml").write_text(
        "distributed_type: FSDP\nmixed_precision: &one bf16\nfsdp_config: &f {fsdp_a: *one}\nfsdp: *f\n"
    )
    assert engine_variables(path)["FSDP_A"] == "bf16"
    path.write_text("partition: &name gpu\naccount: *name\n")
    assert read_settings(path) == {"partition": "gpu", "account": "gpu"}


@pytest.mark.parametrize(
    "name", ["a b", "a'b", 'a"b', "a;touch canary", "a$(touch canary)", "a`touch canary`", "ü", "a\\b"]
)
def test_a_file_s_name_is_no_command_of_the_agent(name: str, tmp_path: Path):
    work = Work(
        run_dir=str(tmp_path), code=str(tmp_path), folder=str(tmp_path), arguments=("train", name),
        engine_file=f"{tmp_path}/{name}.yaml",
    )  # fmt: skip
    text = sbatch_text(SubmitConfig(launcher=Launcher.accelerate, python="printf '%s\\0' x"), work)
    agent = sbatch_text(replace(SubmitConfig(launcher=Launcher.accelerate), python="printf"), work)
    job = 'begin_attempt() { :; }\nend_attempt() { :; }\nlaunch() { shift 4; "$@"; }\n'
    for script in (text, agent):
        (tmp_path / "script").write_text(script.replace('source "$code/iccld/slurm/job.sh"', job))
        environment = {"PATH": "/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "1", "SLURM_NODEID": "0",
                       "SLURM_LAUNCH_NODE_IPADDR": "::1"}  # fmt: skip
        subprocess.run(["bash", "script"], cwd=tmp_path, capture_output=True, timeout=20, check=False, env=environment)
        assert not (tmp_path / "canary").exists()


AGENT = """\
#!{python}
import os, pathlib, signal, sys, time

def hear(name, number, status):
    def heard(*_):
        os.write(1, f"{{name}}\\n".encode())
        os._exit(status)
    signal.signal(number, heard)

hear("agent heard TERM", signal.SIGTERM, 1)
if {is_late}:
    pathlib.Path("started").touch()
    time.sleep(2)
if (rank := os.fork()) == 0:
    hear("rank heard USR1", signal.SIGUSR1, 0)
    pathlib.Path("started").touch()
    time.sleep(60)
os.waitpid(rank, 0)
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("number", "is_late", "of_all"),
    [
        (signal.SIGUSR1, False, False),
        (signal.SIGUSR1, True, False),
        (signal.SIGUSR1, False, True),
        (signal.SIGTERM, False, False),
        (signal.SIGTERM, True, False),
    ],
)
def test_a_signal_to_the_task_alone_reaches_the_ranks_of_an_agent(
    tmp_path: Path, number: int, is_late: bool, of_all: bool
):
    """SLURM signals a step's first process alone where it knows processes by cgroups, and all of them elsewhere."""
    (tmp_path / "python").write_text(AGENT.format(python=sys.executable, is_late=is_late))
    (tmp_path / "python").chmod(0o755)
    work = Work(run_dir=str(tmp_path), code=str(tmp_path), folder=str(tmp_path), engine_file=f"{tmp_path}/e.yaml")
    text = sbatch_text(SubmitConfig(launcher=Launcher.accelerate, python=f"{tmp_path}/python"), work)
    job = 'begin_attempt() { :; }\nend_attempt() { :; }\nlaunch() { shift 4; exec "$@"; }\n'
    (tmp_path / "script").write_text(text.replace('source "$code/iccld/slurm/job.sh"', job))
    own = {"PATH": "/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "1", "SLURM_NODEID": "0"}
    task = subprocess.Popen(
        ["bash", "script"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=own | {"SLURM_LAUNCH_NODE_IPADDR": "::1"},
    )  # fmt: skip
    wait_until((tmp_path / "started").exists, 20, "the agent")
    (os.killpg if of_all else os.kill)(task.pid, number)
    said, _ = task.communicate(timeout=20)
    assert set(said.splitlines()) == {"rank heard USR1"} and task.returncode == 3
