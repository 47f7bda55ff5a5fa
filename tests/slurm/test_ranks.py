"""Variables that a task of a job step is given, without a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iccld.slurm.engine_file import ENGINE_FILES, engine_path, engine_variables
from iccld.slurm.ranks import (
    FIRST_PORT,
    NUM_PORTS,
    interface_towards,
    master_port,
    missing_gpus,
    rank_environment,
    tasks_per_node,
)

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3",
    "SLURM_JOB_ID": "77",
}


def test_a_task_is_a_rank():
    assert rank_environment(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "2",
        "MASTER_ADDR": "10.1.2.3",
        "MASTER_PORT": "10077",
    }


def test_what_is_said_already_stays():
    assert rank_environment(STEP | {"RANK": "0"}) == {}
    assert "MASTER_ADDR" not in rank_environment(STEP | {"MASTER_ADDR": "10.9.9.9"})


@pytest.mark.parametrize(
    ("environment", "num_seen", "missing"),
    [
        ({}, 0, ""),
        ({"SLURM_GPUS_ON_NODE": "8"}, 0, "1 GPUs, and torch sees 0"),
        ({"SLURM_GPUS_ON_NODE": "8"}, 1, ""),  # each task may have one of them
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 7, "8 GPUs, and torch sees 7"),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}, 1, ""),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, 0, ""),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0, ""),
    ],
)
def test_gpus_of_the_allocation_that_are_not_there_are_missed(environment: dict[str, str], num_seen: int, missing: str):
    assert missing in (found := missing_gpus(environment, num_seen=num_seen)) and bool(found) == bool(missing)


@pytest.mark.parametrize("name", STEP)
def test_outside_a_job_step_it_says_how_to_start(name: str):
    with pytest.raises(ValueError, match=rf"{name} is not set.*start it with srun"):
        rank_environment({key: value for key, value in STEP.items() if key != name})


@pytest.mark.parametrize(("text", "tasks"), [("1", [1]), ("4(x2)", [4, 4]), ("2(x3),1,3(x2)", [2, 2, 2, 1, 3, 3])])
def test_tasks_per_node(text: str, tasks: list[int]):
    assert tasks_per_node(text) == tasks


def test_ports_of_jobs_that_follow_one_another_differ_and_are_no_system_s_own():
    ports = [master_port(job) for job in range(1_999_990, 2_000_010)]
    ports += [master_port(1_999_990, restart=restart) for restart in range(1, 20)]
    assert len(set(ports)) == 39 and min(ports) >= FIRST_PORT and max(ports) < FIRST_PORT + NUM_PORTS < 32_768


def test_the_interface_towards_this_machine_is_the_loopback():
    assert interface_towards("127.0.0.1") == "lo"


def test_no_interface_is_named_towards_an_address_of_ipv6():
    """Gloo then finds it by itself: the rank must not fail for a hint."""
    assert interface_towards("::1") == interface_towards("fd00::1") == ""


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero2"])
def test_ranks_see_what_accelerate_s_launcher_would_have_set(engine: str):
    """Only the variables that tell engines apart are compared."""
    said = engine_variables(engine_path(engine))
    code = (
        "import json, sys\n"
        "from accelerate.commands import launch as l\n"
        "from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env\n"
        "a = l.launch_command_parser().parse_args(['--config_file', sys.argv[1], 'x.py'])\n"
        "a, _, _ = l._validate_launch_command(a)\n"
        "a.deepspeed_fields_from_accelerate_config = ''\n"
        "env = prepare_deepspeed_cmd_env(a)[1] if a.use_deepspeed else prepare_multi_gpu_env(a)\n"
        "print(json.dumps({k: str(v) for k, v in env.items()}))\n"
    )
    command = [sys.executable, "-c", code, str(ENGINE_FILES / f"{engine}.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True, env={**os.environ})
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert {name: theirs.get(name) for name in said} == said
    switches = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "FSDP_VERSION")
    assert {n: said.get(n) for n in switches} == {n: theirs.get(n) for n in switches}


def test_an_unknown_engine_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"engine=zero9.*ddp"):
        engine_path("zero9")
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match="no distributed_type"):
        engine_variables(engine_path(str(tmp_path / "other.yaml")))
