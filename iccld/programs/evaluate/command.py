"""`iccld evaluate`: its arguments, and scoring that signals may stop."""

import argparse
from pathlib import Path

from iccld.programs.arguments import add_settings
from iccld.programs.stopped import status_of_stopped

DESCRIPTION = """\
Score the finished stages of a run.

  iccld evaluate runs/a inference.num_steps=[1,4]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `iccld evaluate`."""
    parser.add_argument("run_dir", type=Path, help="a run directory that train wrote")
    add_settings(parser, config_dir=False)
    parser.add_argument("--model", default="", help="a model folder to score instead of the run's own")


def run(arguments: argparse.Namespace) -> int:
    """Score, and return the exit status."""
    from iccld.runtime.faults.preemption import Preemption

    with Preemption() as preemption:
        from iccld.programs.evaluate.evaluate import evaluate_run, saved_settings

        config = saved_settings(arguments.run_dir, arguments.overrides)
        finished = evaluate_run(config, preemption, model_folder=arguments.model)
    message = "iccld evaluate: stopped by a signal; the same command begins again"
    return 0 if finished else status_of_stopped(config, message, by_hand=preemption.by_hand)
