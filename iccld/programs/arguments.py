"""How the arguments of a verb are declared and parsed.

A verb is a module with `DESCRIPTION`, `add_arguments(parser)` and `run(arguments)`. What is slow to import, it imports
only when it runs.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from iccld.outcome import REFUSED
from iccld.reading import read_secrets
from iccld.redact import redact
from iccld.suggestions import for_message


class Verb(Protocol):
    """The module of a verb. DESCRIPTION: what the verb does, and one example."""

    @property
    def DESCRIPTION(self) -> str: ...
    @property
    def add_arguments(self) -> Callable[[argparse.ArgumentParser], None]: ...
    @property
    def run(self) -> Callable[[argparse.Namespace], int | None]: ...


class Parser(argparse.ArgumentParser):
    """A parser whose messages show no secret and whose options cannot be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            *args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | kwargs
        )

    def error(self, message: str) -> NoReturn:
        near, remedy = for_message(message), f"`{self.prog} --help` shows what can be given"
        self.exit(REFUSED, f"{redact(f'{self.prog}: {message}{near}', sys.argv)} ({remedy})\n")


def parse_verb(name: str, verb: Verb, words: Sequence[str]) -> argparse.Namespace:
    """Parse the words behind a verb's name. Settings may also stand after an option. Exits with 2 for a wrong word."""
    parser = Parser(f"iccld {name}", description=verb.DESCRIPTION)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, too")
    verb.add_arguments(parser)
    arguments, left = parser.parse_known_args(words)
    if "--debug" in left:  # behind an action
        arguments.debug, left = True, [word for word in left if word != "--debug"]
    if stray := [word for word in left if word.startswith("-") or "=" not in word or "overrides" not in arguments]:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if left:
        arguments.overrides += left
    arguments.verb, arguments.run = name, verb.run
    return arguments


def add_settings(parser: argparse.ArgumentParser, *, config_dir: bool = True) -> None:
    """Add `key=value`, `--secrets` and, unless the settings come from a run, `--config-dir`."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings; `iccld config` shows all")
    if config_dir:
        parser.add_argument("--config-dir", default="", help="a folder with YAML groups of your own")
    about = "a file of yours alone (mode 0600) with key=value lines, which other users do not see as they do a command"
    parser.add_argument("--secrets", type=Path, action="append", default=[], metavar="FILE", help=about)


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """Return the settings of the files of `--secrets`, then those of the command line, which override them.

    Raises ValueError, and OSError where a file cannot be read.
    """
    return [*(word for path in arguments.secrets for word in read_secrets(path)), *arguments.overrides]
