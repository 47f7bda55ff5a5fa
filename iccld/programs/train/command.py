"""`iccld train`: its arguments, and a run that signals may stop."""

import argparse
import os
import time

from iccld.programs.arguments import add_settings
from iccld.programs.stopped import status_of_stopped

DESCRIPTION = """\
Train the stages of an experiment and score them; the same command goes on where it was stopped.

  iccld train experiment=gta5_to_cityscapes run_dir=runs/a
"""
add_arguments = add_settings


def run(arguments: argparse.Namespace) -> int:
    """Train, and return the exit status."""
    from iccld.runtime.faults.preemption import Preemption
    from iccld.runtime.measure.terminal import open_terminal

    began = float(os.environ.get("ICCLD_ATTEMPT_BEGAN") or time.time())  # the job script's word, else now
    with Preemption() as preemption, open_terminal("starting") as terminal:  # before the imports, which take seconds
        from iccld.config import load_config
        from iccld.programs.train.train import train

        config = load_config(arguments.overrides, config_dir=arguments.config_dir)
        finished = train(config, preemption, began=began, terminal=terminal)
    message = "iccld train: stopped by a signal; the same command goes on"
    return 0 if finished else status_of_stopped(config, message, by_hand=preemption.by_hand)
