"""`iccld train`: its arguments, and a run that signals may stop."""

import argparse
import os
import time
from pathlib import Path

from iccld.node import launched_world_size
from iccld.programs.arguments import add_settings
from iccld.programs.stopped import status_of_stopped

DESCRIPTION = """\
Train the stages of an experiment and score them; the same command goes on where it was stopped.

  iccld train experiment=gta5_to_cityscapes run_dir=runs/a
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `iccld train`."""
    add_settings(parser)
    about = "let stages that have begun, or are finished, do more steps: a larger stageN.trainer.num_steps"
    parser.add_argument("--extend", action="store_true", help=about)
    about = "train a run for each of several values, as in seed=0,1,2; hydra/launcher=submitit_slurm makes jobs of them"
    parser.add_argument("--multirun", action="store_true", help=about)
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="ranks of each run of --multirun (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Train, and return the exit status. Raises ValueError for what the user got wrong."""
    if arguments.multirun:
        return _train_many(arguments)
    if arguments.ranks != 1:
        raise ValueError(
            f"--ranks {arguments.ranks} is of --multirun; give `iccld launch {arguments.ranks} train ...`."
        )
    from iccld.runtime.faults.preemption import Preemption
    from iccld.runtime.measure.terminal import open_terminal

    began = float(os.environ.get("ICCLD_ATTEMPT_BEGAN") or time.time())  # the job script's word, else now
    with Preemption() as preemption, open_terminal("starting") as terminal:  # before the imports, which take seconds
        from iccld.config import load_config
        from iccld.programs.train.train import train

        config = load_config(arguments.overrides, config_dir=arguments.config_dir)
        finished = train(config, preemption, began=began, extend=arguments.extend, terminal=terminal)
    message = "iccld train: stopped by a signal; the same command goes on"
    return 0 if finished else status_of_stopped(config, message, by_hand=preemption.by_hand)


def _train_many(arguments: argparse.Namespace) -> int:
    """Train the runs of a sweep. `overrides` holds the words of the files of --secrets first."""
    from iccld.programs.train.multirun import train_jobs
    from iccld.programs.train.sweep import jobs_of, words_of_hydra
    from iccld.reading import read_secrets

    if launched_world_size() > 1:
        raise ValueError("--multirun begins runs, and is no rank of one; use `iccld train --multirun --ranks R ...`.")
    if arguments.ranks < 1:
        raise ValueError(f"--ranks {arguments.ranks} must be at least 1.")
    secret = [word for path in arguments.secrets for word in read_secrets(path)]
    words = arguments.overrides[len(secret) :]
    jobs = jobs_of(words, secret=secret, config_dir=arguments.config_dir, num_ranks=arguments.ranks)
    options = [f"--secrets={path.absolute()}" for path in arguments.secrets]
    options += [f"--config-dir={Path(arguments.config_dir).absolute()}"] if arguments.config_dir else []
    options += ["--extend"] if arguments.extend else []
    return train_jobs(jobs, options, num_ranks=arguments.ranks, words=words_of_hydra(words))
