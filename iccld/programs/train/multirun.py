"""Trains the runs of a sweep by a launcher of Hydra: one after the other here, or as jobs of SLURM by submitit.

Hydra counts jobs, and knows no setting of theirs: each job is a process `iccld train` with its words to the letter.
What Hydra writes lies in RUN_DIR/.hydra, with a file NAME.status for each job that has ended.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from iccld.durable import make_folder, write_whole
from iccld.outcome import AGAIN, Interrupted
from iccld.programs.run.child import how_it_failed, run_child, status_of_all
from iccld.programs.train.sweep import Job, unfinished
from iccld.runtime.faults.lock import locked

FOLDER = ".hydra"
OF_SLURM = "hydra/launcher=submitit_slurm"
MAX_NUM_TIMEOUT = 100
"""Number of times that a job whose time is over is put into the queue again; `hydra.launcher.max_num_timeout` sets it.
"""


def train_jobs(jobs: Sequence[Job], options: Sequence[str], *, num_ranks: int, words: Sequence[str]) -> int:
    """Train all jobs, say how each ended, and return the exit status.

    options: those of `train` for each job, as `--secrets=FILE`. words: Hydra's own, which choose the launcher. Raises
    ValueError for what Hydra refuses.
    """
    top = Path(jobs[0].run_dir).parent
    folder = make_folder(top / FOLDER, within=top)
    with locked(folder) as holder:
        if holder:
            raise ValueError(f"run_dir={top} is in use by {holder}; wait for it, end it, or use another run_dir.")
        return _train_jobs(jobs, options, folder, num_ranks=num_ranks, words=words)


def _train_jobs(
    jobs: Sequence[Job], options: Sequence[str], folder: Path, *, num_ranks: int, words: Sequence[str]
) -> int:
    for job in jobs:
        _status_file(folder, job).unlink(missing_ok=True)
    launch = ["launch", str(num_ranks)] if num_ranks > 1 else []
    python = [sys.executable, "-m", "iccld", *launch, "train", *options]
    commands = [[*python, *job.words] for job in jobs]
    came: list[int] = []

    def train_one(config: Any) -> None:
        """A job, in this process or, sent there by the launcher, in one on another machine."""
        job = jobs[config.job]
        if came:
            return
        print(f"[{config.job + 1}/{len(jobs)}] {job.name}: begins, in {job.run_dir}", flush=True)
        status, number = run_child(commands[config.job])
        write_whole(_status_file(folder, job), f"{status}\n")
        came.extend([number] if number else [])

    _sweep(train_one, len(jobs), folder, words)
    status = _report(jobs, folder)
    if came:
        print(f"iccld train: stopped by {signal.Signals(came[0]).name}; the same command goes on", flush=True)
        return 128 + came[0]
    return status


def _status_file(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.status"


def _sweep(task: Callable[[Any], None], num_jobs: int, folder: Path, words: Sequence[str]) -> None:
    """Let Hydra launch the task with `config.job` from 0 on. Raises ValueError, and Interrupted if a job was lost."""
    place = QuotedString(str(folder.absolute()).replace("\\", "\\\\").replace("${", "\\${"), Quote.single)
    own = [
        f"+job=range(0,{num_jobs})" if num_jobs > 1 else "+job=0",
        f"hydra.sweep.dir={place.with_quotes()}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",  # `disabled` would silence each logger that this process has
        "hydra/hydra_logging=none",
    ]
    if OF_SLURM in words:  # by default, submitit gives up a job at the first end of its time
        own.append(f"hydra.launcher.max_num_timeout={MAX_NUM_TIMEOUT}")
    with _command_line(["iccld", "--multirun", *own, *words]):
        try:
            hydra.main(config_path=None, version_base="1.3")(task)()
        except (HydraException, OmegaConfBaseException) as error:
            said = " ".join(str(error).split())
            remedy = "; submitit needs pip install 'iccld[slurm]'" if "submitit" in said else ""
            raise ValueError(f"--multirun: {said[:300]}{remedy}.") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "submitit":
                raise
            raise Interrupted(f"--multirun: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _command_line(argv: list[str]) -> Iterator[None]:
    """Show Hydra this command line within the block, and have it raise its errors in place of printing them."""
    full = "HYDRA_FULL_ERROR"
    before, sys.argv, chosen = sys.argv, argv, os.environ.get(full)
    os.environ[full] = "1"
    try:
        yield
    finally:
        sys.argv = before
        os.environ.pop(full)
        if chosen is not None:
            os.environ[full] = chosen


def _report(jobs: Sequence[Job], folder: Path) -> int:
    """Say of each job how it ended; return the exit status for all."""
    failed: list[int] = []
    for job in jobs:
        path = _status_file(folder, job)
        text = path.read_text().strip() if path.is_file() else ""
        status = int(text) if text.lstrip("-").isdigit() else None
        status = 0 if status == job.stopped_status else status
        left = unfinished(job) if status == 0 else []
        if status == 0 and not left:
            print(f"{job.name}: finished", flush=True)
            continue
        failed.append(AGAIN if status is None else status)
        print(f"iccld train: {job.name}: {_why(status, left)}; its run is {job.run_dir}", file=sys.stderr, flush=True)
    if not failed:
        return 0
    print(f"iccld train: {len(failed)} of {len(jobs)} runs are not finished; the same command goes on", file=sys.stderr)
    return status_of_all(failed)


def _why(status: int | None, left: Sequence[str]) -> str:
    if status is None:
        return "did not run to its end"
    return how_it_failed(status) if status else f"stopped before {' and '.join(left)} was finished"
