"""`iccld profile`: its arguments."""

import argparse
from pathlib import Path

from iccld.programs.arguments import add_settings

DESCRIPTION = """\
Train each stage for some steps and report where their time and memory go.

  iccld profile experiment=gta5_to_cityscapes run_dir=runs/a
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `iccld profile`."""
    add_settings(parser)
    add = parser.add_argument
    add("--num-steps", type=int, default=20, help="steps that are timed (default %(default)s)")
    add("--num-warmup", type=int, default=5, help="steps before them, left out (default %(default)s)")
    add("--num-traced", type=int, default=3, help="steps in a trace, after them (default %(default)s)")
    add("--synthetic", action="store_true", help="take batches from memory: what is left is not the loader's")
    add("--output", type=Path, metavar="FOLDER", help="for the reports (RUN_DIR/profile)")


def run(arguments: argparse.Namespace) -> int:
    """Profile, and return the exit status."""
    from iccld.programs.profile.profile import run

    return run(arguments)
