"""`iccld evaluate`: its arguments, and a scoring that signals may stop."""

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
    parser.add_argument("run_dir", metavar="RUN_OR_MODEL", help="a run directory, a model folder, or owner/name")
    add_settings(parser, config_dir=False)
    parser.add_argument("--model", default="", help="a model folder to score instead of the run's own")
    parser.add_argument("--shards", default="", help="the labelled set to score on; a model folder needs one")
    about = "of a model folder: for report/ (default %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("evaluations"), help=about)


def run(arguments: argparse.Namespace) -> int:
    """Score, and return the exit status."""
    from iccld.runtime.faults.preemption import Preemption
    from iccld.runtime.measure.terminal import open_terminal

    with Preemption() as preemption, open_terminal("starting") as terminal:
        from iccld.programs.evaluate.evaluate import evaluate_run, settings_and_model

        config, model = settings_and_model(
            arguments.run_dir, arguments.overrides, shards=arguments.shards, output=arguments.output
        )
        finished = evaluate_run(config, preemption, model_folder=arguments.model or model, terminal=terminal)
    message = "iccld evaluate: stopped by a signal; the same command begins again"
    return 0 if finished else status_of_stopped(config, message, by_hand=preemption.by_hand)
