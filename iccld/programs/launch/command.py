"""`iccld launch`: its arguments."""

import argparse
import os
import sys
import time

from iccld.slurm.engine_file import OF_ONE_PROCESS, SHARDED, engine_path, engine_variables, kind_of

DESCRIPTION = """\
Run a verb with several ranks on this machine: one a GPU or, without GPUs, on its cores.

  iccld launch 2 --engine zero2 train experiment=gta5_to_cityscapes run_dir=runs/a

An engine is ddp (the default), zero1, zero2 or fsdp2: what the ranks share. accelerate's launcher forms the ranks.
They find each other on the loopback interface, which no other machine reaches; the host's name need not resolve.
"""
USAGE = "iccld launch NUM_RANKS [--engine ENGINE] VERB [ARGUMENTS]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `iccld launch`; what follows the verb is the verb's own."""
    parser.usage = USAGE
    parser.add_argument("--engine", default="ddp", help="ddp (default), zero1, zero2, fsdp2, or a YAML file's path")
    about = "the number of ranks, then a verb with its arguments"
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="NUM_RANKS VERB ...", help=about)


def split(arguments: argparse.Namespace) -> tuple[int, str, list[str]]:
    """Return the number of ranks, the engine, and the verb with its arguments. Raises ValueError."""
    engine, words = arguments.engine, list(arguments.words)
    if words[1:2] == ["--engine"]:
        engine, words = "".join(words[2:3]), [words[0], *words[3:]]
    elif len(words) > 1 and words[1].startswith("--engine="):
        engine, words = words[1].partition("=")[2], [words[0], *words[2:]]
    if len(words) < 2 or not words[0].isdigit() or int(words[0]) < 1 or words[1].startswith("-"):
        given = " ".join(words[:2])
        raise ValueError(f"{given!r} must be a number of ranks and a verb: {USAGE}.")
    return int(words[0]), engine, words[1:]


def run(arguments: argparse.Namespace) -> int:
    """Launch, and return the exit status of the first rank that failed, or 0. Raises ValueError."""
    num_ranks, engine, command = split(arguments)
    path = engine_path(engine)
    kind = kind_of(path)
    if num_ranks > 1 and kind in OF_ONE_PROCESS:
        raise ValueError(f"launch {num_ranks} --engine {engine}: {path} forms one process; use ddp, or launch 1.")
    if num_ranks == 1 and kind not in SHARDED:  # it needs no launcher, and hears signals itself
        os.environ.update(engine_variables(path))
        os.execv(sys.executable, [sys.executable, "-m", "iccld", *command])
    os.environ.setdefault("ICCLD_ATTEMPT_BEGAN", f"{time.time()}")  # a training's first process is this one
    from iccld.runtime.measure.terminal import open_terminal

    with open_terminal(f"starting {num_ranks} ranks"):  # whose rank 0 goes on with a line of its own
        from iccld.programs.launch.local import launch

    return launch(num_ranks, path, command)
