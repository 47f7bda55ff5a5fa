"""Text of a job script: a function of the settings and of the work, and of nothing else."""

import re
import shlex
from collections.abc import Iterator

from iccld.slurm.config import Container, Launcher, SubmitConfig, Work
from iccld.slurm.ranks import FIRST_PORT, NUM_PORTS, PORT_STRIDE

_LOADS = re.compile(r"(module|ml|conda|mamba|micromamba|spack) [^|&;<>(){}`\\#]*")
_SOURCES = re.compile(r"(source|\.) (?P<file>[^\s|&;<>(){}`\\#'\"]*/[^\s|&;<>(){}`\\#'\"]*)")
NCCL = """\
# NCCL chooses its network itself; where it chooses wrongly, say:
# export NCCL_SOCKET_IFNAME=ib0    # the interface for its first contact, where a node has several
# export NCCL_IB_HCA=mlx5          # which InfiniBand adapters; NCCL_IB_DISABLE=1 for none
# export NCCL_DEBUG=INFO           # once, to read in the log what it has chosen
"""


_OWN_VARIABLES = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "OMP_NUM_THREADS")


def sbatch_text(config: SubmitConfig, work: Work) -> str:
    """Write the script that sbatch takes."""
    parts = [
        "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in _directives(config, work)),
        "".join(_what_is_run(work)),
        "".join(_environment(config, work)),
        f'source "$code/iccld/slurm/job.sh"\nbegin_attempt "$run_dir"\n{_launch(config, work)}end_attempt\n',
    ]
    return "\n".join(parts)


def _directives(config: SubmitConfig, work: Work) -> Iterator[str]:
    is_array = bool(work.variants)
    yield f"--job-name={config.job_name}"
    for name in ("account", "partition", "qos", "constraint"):
        if value := getattr(config, name):
            yield f"--{name}={_directive_value(value)}"
    agents = config.launcher is Launcher.accelerate
    yield f"--nodes={config.nodes}"
    yield f"--ntasks-per-node={1 if agents else config.tasks_per_node}"
    yield f"--cpus-per-task={config.cpus_per_task * (config.tasks_per_node if agents else 1)}"
    if config.gpus_per_node:
        yield f"--gres=gpu:{config.gpu_type + ':' if config.gpu_type else ''}{config.gpus_per_node}"
    if config.memory:
        yield f"--mem={config.memory}"
    yield f"--time={config.time}"
    if config.exclude:
        yield f"--exclude={','.join(config.exclude)}"
    if config.after:
        yield f"--dependency={'aftercorr' if is_array else 'afterok'}:{':'.join(config.after)}"
        yield "--kill-on-invalid-dep=yes"
    if is_array:
        yield f"--array=0-{len(work.variants) - 1}" + (f"%{config.max_running}" if config.max_running else "")
    yield f"--signal=USR1@{config.lead_s}"
    yield "--requeue" if config.requeue else "--no-requeue"
    yield "--open-mode=append"
    log = f"{work.run_dir.replace('%', '%%')}/logs/%x-{'%A_%a' if is_array else '%j'}.log"
    yield f"--output={_directive_value(log)}"
    yield f"--chdir={_directive_value(work.folder)}"
    for directive in config.directives:
        option, given, value = directive.partition("=")
        yield option + given + _directive_value(value)


def _directive_value(value: str) -> str:
    """Put a value in double quotes if sbatch would end it at a space, a quote or a comment."""
    if not set(value) & set(" \"'#"):
        return value
    return '"' + value.replace('"', '\\"') + '"'


def _what_is_run(work: Work) -> Iterator[str]:
    yield f"code={shlex.quote(work.code)}\n"
    if not work.variants:
        yield f"run_dir={shlex.quote(work.run_dir)}\n{_array(work.arguments)}"
        return
    yield "case $SLURM_ARRAY_TASK_ID in\n"
    for number, variant in enumerate(work.variants):
        words = " ".join(shlex.quote(argument) for argument in variant.arguments)
        yield f"{number}) run_dir={shlex.quote(variant.run_dir)} command=({words}) ;;\n"
    yield "esac\n"


def _array(arguments: tuple[str, ...]) -> str:
    return "command=(\n" + "".join(f"    {shlex.quote(argument)}\n" for argument in arguments) + ")\n"


def _environment(config: SubmitConfig, work: Work) -> Iterator[str]:
    for line in (*(f"module load {module}" for module in config.modules), *config.setup):
        yield _noticed(line)
    if not work.variants:  # sbatch hands on the variables of an array's element in which it was called
        yield "unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID\n"
    yield "export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1\n"
    yield f"export OMP_NUM_THREADS={config.cpus_per_task}\n"
    if config.launcher is Launcher.srun:
        yield from (f"export {name}={shlex.quote(value)}\n" for name, value in work.variables.items())
    else:
        yield f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={config.lead_s}\n"  # the agent would end its ranks after 30 s
        if not config.gpus_per_node:
            yield "export ACCELERATE_USE_CPU=true\n"
    if config.gpus_per_node:
        yield NCCL
    for name in ("max_stalled", "lead_s"):
        if (value := getattr(config, name)) != getattr(SubmitConfig, name):
            yield f"{name}={value}\n"
    if not config.requeue:
        yield "requeue=no\n"


def _noticed(line: str) -> str:
    """Let the job know that a line of the setup failed where that is plain: it would run something else without it.

    The status of a file that is sourced is its last line's, and tells nothing.
    """
    failed = f"failed_setup={shlex.quote(line)}"
    if _LOADS.fullmatch(line):
        return f"{line} || {failed}\n"
    if found := _SOURCES.fullmatch(line):
        return f"[ -r {found['file']} ] || {failed}\n{line}\n"
    return f"{line}\n"


def _launch(config: SubmitConfig, work: Work) -> str:
    step = 'launch srun --kill-on-bad-exit=1 --export=ALL --cpus-per-task="$SLURM_CPUS_PER_TASK"'
    python = shlex.quote(config.python)
    if config.launcher is Launcher.accelerate:
        return f"{step} \\\n    bash -c '{_agent(config, work)}' agent \"${{command[@]}}\"\n"
    if config.container is Container.enroot:
        every = ",".join([*_mounts(work), *config.mounts])
        image = f"--container-image={shlex.quote(config.image)} --container-mounts={shlex.quote(every)}"
        step += f" \\\n    {image} --container-workdir={shlex.quote(work.folder)}"
        step += f" \\\n    --container-env={','.join([*_OWN_VARIABLES, *work.variables])}"  # else the image's own win
    elif config.container is Container.apptainer:
        binds = " ".join(f"--bind {shlex.quote(mount)}" for mount in [*_mounts(work), *config.mounts])
        gpu = " --nv" if config.gpus_per_node or any("gpu" in directive for directive in config.directives) else ""
        step += f" \\\n    apptainer exec{gpu} {binds} --pwd {shlex.quote(work.folder)} {shlex.quote(config.image)}"
    return f'{step} \\\n    {python} -m iccld.programs.rank "${{command[@]}}"\n'


def _mounts(work: Work) -> list[str]:
    """Mount what the job itself reads and writes, each folder at its own place; sub-folders come with it."""
    own = sorted({work.run_dir, work.code, work.folder})
    if any(set(folder) & set(",: ") for folder in own):
        raise ValueError(f"one of {', '.join(own)} holds a comma, colon or space: a container cannot be given it.")
    return [f"{f}:{f}" for f in own if not any(f.startswith(f"{other.rstrip('/')}/") for other in own)]


def _agent(config: SubmitConfig, work: Work) -> str:
    """Write the text for `bash -c` on each node: the agent, and this shell, which hands on what SLURM tells it.

    Where SLURM keeps track of processes by cgroups, a signal to a step reaches this shell alone; else all of them. USR1
    is meant for the ranks, and the agent would die of it. If there are none yet, the shell waits for them.
    """
    job = f"(SLURM_JOB_ID + {PORT_STRIDE} * ${{SLURM_RESTART_COUNT:-0}})"
    options = [
        f"--config_file {shlex.quote(work.engine_file)}",
        f"--num_machines {config.nodes} --num_processes {config.num_ranks}",
        '--machine_rank "$SLURM_NODEID" --main_process_ip "$SLURM_LAUNCH_NODE_IPADDR"',
        f"--main_process_port $(({FIRST_PORT} + {job} % {NUM_PORTS}))",
    ]
    launch = " \\\n        ".join([f"{shlex.quote(config.python)} -m accelerate.commands.launch", *options])
    lines = [
        f'(trap "" USR1; exec {launch} \\\n        --module iccld.programs.rank "$@") &',
        "agent=$!",
        'trap "until pkill -USR1 -P $agent || ! kill -0 $agent; do sleep 1; done 2>/dev/null &" USR1 TERM',
        'while wait "$agent"; status=$?; kill -0 "$agent" 2>/dev/null; do :; done',
        'wait "$agent"; last=$?',  # a wait that a signal ended has another status
        '[ "$last" = 127 ] || status=$last; exit "$status"',  # 127: it was seen
    ]
    return "\n        ".join(lines).replace("'", "'\\''")
