"""`iccld VERB`: a table of verbs, and how each of them ends. Only the module of the given verb is imported."""

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn, TextIO

from iccld import __version__
from iccld.extras import remedy
from iccld.node import launched_rank
from iccld.outcome import REFUSED, is_understood, status_of, words
from iccld.programs.arguments import Parser, Verb, parse_verb, settings_of
from iccld.programs.stopped import leave_word
from iccld.redact import redact
from iccld.tracebacks import guard_tracebacks, text_of

VERBS = {
    "train": ("train.command", "train a run; the same command resumes"),
    "launch": ("launch.command", "run a verb with several ranks on this machine"),
    "submit": ("submit.submit", "train, profile or score as a SLURM job"),
    "evaluate": ("evaluate.command", "score the finished stages of a run"),
    "predict": ("predict", "write label PNG and overlay of images"),
    "export": ("export", "write a program that runs without iccld: torch.export or ONNX"),
    "config": ("configuration", "show the settings of a run and what they mean"),
    "shards": ("shards", "make, index, verify or describe shards"),
    "checkpoint": ("checkpoint_command", "list and check checkpoints, export models, convert"),
    "profile": ("profile.command", "show where a step's time and memory go"),
    "doctor": ("doctor.command", "look at this machine, and at what a run needs of it"),
    "goodput": ("goodput", "show where the wall time of a run went"),
    "report": ("report.command", "write a page of runs: curves, scores, pictures, settings"),
    "runs": ("runs", "list the runs below a folder: state, step, score"),
    "compare": ("compare", "show the settings and scores of two runs that differ"),
    "ablate": ("ablate.command", "compare runs x seeds, and report"),
}
"""Each verb's module in `iccld.programs`, and what the verb does."""

EPILOG = """\
  iccld train experiment=gta5_to_cityscapes run_dir=runs/a

Any setting is changed by key=value; `iccld config experiment=...` shows all of them.
`iccld VERB --help` shows the options of a verb.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. An error is one line on stderr, and an exit status of `outcome`.

    A reader of the output that has enough of it, as `head` has, ends it in silence with 141: 128 + SIGPIPE.
    """
    try:
        try:
            arguments = parse(argv)
            return _run_verb(arguments, sys.argv[1:] if argv is None else argv)
        except ModuleNotFoundError as missing:
            verb = (sys.argv[1:] if argv is None else argv)[0]
            print(f"iccld {verb} {remedy(missing)}", file=sys.stderr, flush=True)
            return REFUSED
        finally:
            for stream in _outputs():
                stream.flush()  # the interpreter would flush at its end, and complain
    except (OSError, SystemExit) as end:
        error = end.__context__ if isinstance(end, SystemExit) else end  # rich exits if a pipe is broken
        if not isinstance(error, OSError if error is end else BrokenPipeError):
            raise
        if not isinstance(error, BrokenPipeError):
            with suppress(OSError):  # stderr may be gone too
                print(f"iccld: the output cannot be written ({error.strerror}).", file=sys.stderr, flush=True)
        for stream in _outputs():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the null device takes what is left in buffers
        return 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else status_of(error)


def _outputs() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # None: the parent process closed it


def _run_verb(arguments: argparse.Namespace, words_given: Sequence[str]) -> int:
    given = list(words_given)
    guard_tracebacks(given, debug=arguments.debug)
    try:
        if getattr(arguments, "secrets", []):
            arguments.overrides = settings_of(arguments)
            given += arguments.overrides
            guard_tracebacks(given, debug=arguments.debug)
        return arguments.run(arguments) or 0
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError | MemoryError) and not is_understood(error):
            raise
        if isinstance(error, BrokenPipeError) and _readers_are_gone():
            raise
        rank = launched_rank()
        if rank > 0:  # ranks that fail alike are ended before they repeat it; one that fails alone speaks
            time.sleep(3)
        if arguments.debug:
            print(text_of(error, given), end="", file=sys.stderr, flush=True)
        line = f"iccld {arguments.verb}: {f'rank {rank}: ' if rank else ''}{redact(words(error), given)}"
        print("".join(map(_printable, line)), file=sys.stderr, flush=True)
        return status_of(error)
    except KeyboardInterrupt as error:  # of a verb that has nothing to save
        if arguments.debug:
            print(text_of(error, given), end="", file=sys.stderr, flush=True)
        print(f"iccld {arguments.verb}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def _printable(character: str) -> str:
    """Spell out what a terminal would take for a command: names come from files that anyone wrote."""
    return character if character.isprintable() or character == "\n" else repr(character)[1:-1]


def run() -> NoReturn:
    """Run the verb of the command line, and end the process."""
    from iccld.runtime.faults.ending import run_to_the_end

    run_to_the_end(lambda: leave_word(main()))


def _readers_are_gone() -> bool:
    """Tell whether nobody reads our output; a broken pipe may also be a server's."""
    pipes = select.poll()
    for stream in _outputs():
        with suppress(OSError, ValueError):  # a test's stream is no file
            pipes.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in pipes.poll(0))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, importing the module of its verb alone. Exits with 2 for a wrong word."""
    given = sys.argv[1:] if argv is None else argv
    summaries = "\n".join(f"  {name:<12}{summary}" for name, (_, summary) in VERBS.items())
    about = f"Train segmentation models on labelled source images and unlabelled target images.\n\n{summaries}"
    top = Parser("iccld", description=about, epilog=EPILOG, usage="iccld VERB ...")
    top.add_argument("--version", action="version", version=f"iccld {__version__}", help="show the version, and exit")
    if "_ARGCOMPLETE" in os.environ:
        _complete(top)
    top.add_argument("verb", choices=VERBS, metavar="VERB", help=argparse.SUPPRESS)
    name = top.parse_args(given[:1]).verb
    return parse_verb(name, _module(name), given[1:])


def _module(name: str) -> Verb:
    return import_module(f"iccld.programs.{VERBS[name][0]}")  # type: ignore[return-value]


def _complete(top: Parser) -> None:
    """Answer a shell that asks how a command line may go on, and end."""
    import argcomplete

    verbs, typed = top.add_subparsers(), os.environ.get("COMP_LINE", "").split()
    for name, (_, summary) in VERBS.items():
        parser = verbs.add_parser(name, help=summary)
        if name in typed[1:2]:
            _module(name).add_arguments(parser)
    argcomplete.autocomplete(top)


if __name__ == "__main__":
    run()
