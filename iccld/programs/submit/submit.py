"""`iccld submit`: job scripts written, shown or handed to sbatch."""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from iccld import __version__
from iccld.durable import NotOursError, is_plain, make_folder, write_whole
from iccld.reading import write_secrets
from iccld.slurm.config import SETTINGS, SubmitConfig, Work
from iccld.slurm.history import failing_nodes, lead_time_s
from iccld.slurm.script import sbatch_text
from iccld.slurm.settings_file import read_settings
from iccld.slurm.snapshot import EDITED, code_version, copy_code

DESCRIPTION = """\
Train, profile or score as a SLURM job. Options of the allocation come before the verb, settings of the run after it:

  iccld submit --nodes 2 --gpus-per-node 4 --time 4:00:00 train experiment=gta5_to_cityscapes run_dir=runs/gta5
"""
_VARIABLES = {"ARRAY": "ARRAY_INX", "MEM": "MEM_PER_NODE", "TIME": "TIMELIMIT"}
"""Options of sbatch whose variable has another name than `SBATCH_` and the option's."""
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
_LISTS = ("exclude", "after", "mounts", "modules", "setup", "directives")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show the script, write and submit nothing")
    parser.add_argument("--settings", type=Path, help="a YAML file with options of those below")
    parser.add_argument("--engine", default="", help="ddp (default), zero1, zero2, fsdp2, or the path of a YAML file")
    parser.add_argument("--chain", action="store_true", help="stage 1, stage 2 and scoring as jobs that wait in turn")
    parser.add_argument("--seeds", default="", metavar="N|A,B,..", help="an array with a run a seed")
    about = "an element of an array: a name, and settings of its own; may be repeated"
    parser.add_argument("--variant", action="append", default=[], nargs="+", metavar="NAME KEY=VALUE", help=about)
    for setting in dataclasses.fields(SubmitConfig):
        if setting.name != "requeue":
            _add_setting(parser, setting)
    parser.add_argument("--no-requeue", dest="requeue", action="store_const", const=False, help="once, and no more")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="train|profile|evaluate ...")


def _add_setting(parser: argparse.ArgumentParser, setting: dataclasses.Field[Any]) -> None:
    options: dict[str, Any] = {"default": None, "metavar": "X"}
    if setting.name in _LISTS:
        example = ", as in --directives=--reservation=NAME" if setting.name == "directives" else ""
        options |= {"action": "append", "help": f"may be repeated{example}"}
    elif isinstance(setting.default, Enum):
        options |= {"choices": [choice.value for choice in type(setting.default)], "metavar": None}
    elif isinstance(setting.default, int):
        options |= {"type": int, "help": f"{setting.default} unless given"}
    parser.add_argument(f"--{setting.name.replace('_', '-')}", **options)


def run(arguments: argparse.Namespace) -> int:
    """Write and submit the job (or the chain's), or show it. Raises ValueError if the user erred."""
    submit_jobs(arguments)
    return 0


def submit_jobs(arguments: argparse.Namespace) -> str:
    """Submit as `run` does; return the last job's number, or in a dry run a word that stands for it."""
    from iccld.programs.submit.work import divided, hide_secrets, jobs_of, run_dir_of, with_grace

    settings = _settings(arguments)
    engine = settings.pop("engine", "ddp")
    command, variants = divided(arguments.command, arguments.variant)
    run_dir = run_dir_of(command)
    config = _with_history(settings, run_dir)
    command = with_grace(command, config.lead_s)
    jobs = jobs_of(
        command, num_ranks=config.num_ranks, engine=engine, chain=arguments.chain, seeds=arguments.seeds,
        variants=variants,
    )  # fmt: skip
    if not arguments.dry_run:
        _prepare(jobs[0][1])
    submitted: list[str] = []
    for suffix, work in jobs:
        name = config.job_name + suffix
        work, secrets = hide_secrets(name, work)
        config_of_job = replace(config, job_name=name)
        text = sbatch_text(config_of_job, work)
        if arguments.dry_run:
            print(text)
        else:
            for path, words in secrets.items():
                write_secrets(path, words)
        dry = f"JOB_OF_{re.sub('[^A-Za-z0-9]', '_', name)}"
        submitted.append(dry if arguments.dry_run else _sbatch(name, text, work, before=submitted))
        config = replace(config, after=(submitted[-1],))
    return submitted[-1]


def _prepare(work: Work) -> None:
    """Make the folders that a job needs, and copy the code that it runs."""
    if not shutil.which("sbatch"):
        raise ValueError("sbatch is not on PATH: submit from a login node of the cluster, or look with --dry-run.")
    run_dir = Path(work.run_dir)
    for folder in ("logs", "slurm", "code"):
        make_folder(run_dir / folder, within=run_dir)
    if strange := next((path for path in (run_dir / "logs").iterdir() if not is_plain(path)), None):
        raise NotOursError(f"{strange} is no file of its own, and SLURM would write a job's log through it; remove it.")
    if copy_code(run_dir / "code") != Path(work.code):
        raise ValueError(EDITED)
    write_whole(run_dir / "code_version.txt", code_version(__version__))


def _sbatch(name: str, text: str, work: Work, *, before: Sequence[str]) -> str:
    """Submit, say where it can be followed, and return the job's number. `before`: the jobs that are submitted."""
    script = Path(work.run_dir) / "slurm" / f"{name}.sbatch"
    write_whole(script, text)
    command, environment = ["sbatch", "--parsable", str(script)], _environment(text, os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = " ".join(done.stderr.split())
    jobs = re.findall(r"^(\d+)(?:;\S*)?$", done.stdout, re.MULTILINE)  # a site's sbatch may say more
    if done.returncode or not jobs:
        left = f"; the jobs before it are submitted; to cancel them: scancel {' '.join(before)}" if before else ""
        unsure = " (look with squeue: the job may have arrived)" if "timed out" in said or not done.returncode else ""
        raise ValueError(f"sbatch refused {script}: {said or ' '.join(done.stdout.split())}{unsure}{left}")
    if said:
        print(f"sbatch: {said}", file=sys.stderr, flush=True)
    log = f"{name}-{jobs[-1]}{'_N' if work.variants else ''}.log"
    print(f"job {jobs[-1]}: {name}, log {work.run_dir}/logs/{log}", flush=True)
    return jobs[-1]


def _environment(script: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out what would overrule the script, and what is of the job in which `iccld submit` itself runs.

    To sbatch, a variable counts for more than a directive; and a job gets its submitter's variables.
    """
    said = {name.upper().replace("-", "_") for name in re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)}
    overruling = {"SBATCH_ERROR", "SBATCH_WAIT"} | {f"SBATCH_{_VARIABLES.get(name, name)}" for name in said}
    overruling |= {"SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"}
    in_job = "SLURM_JOB_ID" in environment
    return {
        name: value
        for name, value in environment.items()
        if name not in overruling and not (in_job and name.startswith("SLURM_") and name not in _OF_THE_CLUSTER)
    }


def _with_history(settings: dict[str, Any], run_dir: Path) -> SubmitConfig:
    """Fill in from the run what is not set: its name, how long a save takes, which nodes failed."""
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", run_dir.name).lstrip("._+-") or "iccld"
    config: dict[str, Any] = {"job_name": name[:80], "lead_s": lead_time_s(run_dir)} | settings
    if "image" not in config:
        config.setdefault("python", sys.executable)
    if failing := failing_nodes(run_dir):
        said = f"not on {', '.join(failing)}: failed twice ({run_dir}/slurm/failed_nodes)"
        print(said, file=sys.stderr, flush=True)  # the output may be a script
        config["exclude"] = tuple(dict.fromkeys([*config.get("exclude", ()), *failing]))
    return SubmitConfig(**config)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Join the options of the command line with those of the file, which they override."""
    settings: dict[str, Any] = {}
    if arguments.settings:
        settings |= read_settings(arguments.settings)
    settings |= {name: given for name in (*SETTINGS, "engine") if (given := getattr(arguments, name)) not in (None, "")}
    for name in settings.keys() & set(_LISTS):
        settings[name] = tuple(str(value) for value in settings[name])
    for setting in dataclasses.fields(SubmitConfig):
        if isinstance(setting.default, Enum) and isinstance(given := settings.get(setting.name), str):
            settings[setting.name] = type(setting.default)(given)
    return settings
