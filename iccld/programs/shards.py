"""`iccld shards make|index|verify|info`: the actions, each with the arguments that its module declares."""

import argparse
import sys

from iccld.data.processes import Stopped, stoppable
from iccld.data.shards import describing, indexing, making, verifying

DESCRIPTION = """\
Turn a data set into shards, and index, check or describe shards.

  iccld shards make --dataset gta5 --input DIR --output DIR
"""
ACTIONS = {
    "make": (making, "convert a data set to tars and an index"),
    "index": (indexing, "index tars that were made elsewhere"),
    "verify": (verifying, "read everything once, and name what is broken"),
    "info": (describing, "show counts, sizes and class shares"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `iccld shards`, each with its arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, (action, summary) in ACTIONS.items():
        action.add_arguments(actions.add_parser(name, help=summary, description=f"{summary.capitalize()}."))


def run(arguments: argparse.Namespace) -> int:
    """Run the action, and return the exit status."""
    try:
        with stoppable():
            return ACTIONS[arguments.action][0].run(arguments)
    except Stopped as stopped:
        again = "goes on" if arguments.action == "make" else "starts anew"
        print(f"iccld shards {arguments.action}: {stopped}; the same command {again}", file=sys.stderr, flush=True)
        return 128 + stopped.signal
