"""Console that tables are printed on, and what a cell holds."""

import sys

from rich.console import Console
from rich.markup import escape

from iccld.texts import shown

WIDTH = 160
"""Columns of what is no terminal, such as a pipe or a job's log: rich would take 80, and cut cells off."""


def table_console() -> Console:
    """Return a console for standard output, which may be closed: as wide as the terminal, or `WIDTH`."""
    return Console(width=None if sys.stdout is not None and sys.stdout.isatty() else WIDTH)


def cell(text: object) -> str:
    """Return what a table shows of a text that anyone may have written: a terminal's commands and markup as letters."""
    return escape(shown(str(text)))
