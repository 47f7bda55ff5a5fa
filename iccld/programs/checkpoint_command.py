"""`iccld checkpoint list|verify|export|convert`: its arguments."""

import argparse
from pathlib import Path

DESCRIPTION = """\
List and check checkpoints, and get models out of them.

  iccld checkpoint list runs/a
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `iccld checkpoint`, each with its arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("list", "show steps, sizes, engine and ranks"),
        ("verify", "compare every file's checksum"),
    ):
        action = actions.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        action.add_argument("folder", type=Path, help="a run directory, or one checkpoint")
    about = "write a model folder that ICCLD.from_pretrained loads"
    export = actions.add_parser("export", help=about, description=about)
    export.add_argument("--weights", choices=["teacher", "student"], default="teacher", help="default %(default)s")
    about = "copy into another number of files (to resume on other ranks or engines, nothing needs converting)"
    convert = actions.add_parser("convert", help=about, description=about)
    convert.add_argument("--num-files", type=int, required=True, help="of about equal size")
    for action in (export, convert):
        action.add_argument("folder", type=Path, metavar="checkpoint", help="as RUN_DIR/stage1/checkpoints/step_...")
        action.add_argument("output", type=Path, help="a folder that is not there")


def run(arguments: argparse.Namespace) -> int:
    """Run the action, and return the exit status."""
    from iccld.programs.checkpoint import run

    return run(arguments)
