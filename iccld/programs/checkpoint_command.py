"""`iccld checkpoint`: its arguments, a list of the checkpoints, and a check that they are whole."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from iccld.reading import GIB
from iccld.runtime.checkpoint.errors import CheckpointError
from iccld.runtime.checkpoint.manifest import STEP_FOLDER, pointed_at, read_manifest, verify
from iccld.tables import cell, table_console
from iccld.texts import shown

VANISHES_S = 1.0

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
    """Run the action, and return the exit status: 1 if something is damaged. Raises ValueError."""
    if arguments.action == "list":
        return list_checkpoints(arguments.folder)
    if arguments.action == "verify":
        return verify_checkpoints(arguments.folder)
    from iccld.programs.checkpoint import run

    return run(arguments)


def list_checkpoints(folder: Path) -> int:
    """Print a table; sizes are compared, contents not."""
    table = Table("stage", "step", "GiB", "written by", "files", "state")
    whole = True
    for path in _checkpoints(folder):
        row, is_whole = _row(path)
        if is_whole or not _vanishes(path):
            table.add_row(*row)
            whole &= is_whole
    table_console().print(table)
    return 0 if whole else 1


def _row(path: Path) -> tuple[list[str], bool]:
    """Return a checkpoint's line of the table, and whether it looks whole."""
    marks = ["latest"] if pointed_at(path.parent) == path.name else []
    try:
        manifest = read_manifest(path)
        layout, files = manifest["layout"], manifest["files"]
        sizes = [path.joinpath(name).stat().st_size if (path / name).is_file() else 0 for name in files]
    except (CheckpointError, FileNotFoundError) as error:
        return ["", cell(path.name), "", "", "", cell(error)], False
    is_whole = sizes == [facts["size"] for facts in files.values()]
    marks += [] if is_whole else ["damaged"]
    size, by = f"{sum(sizes) / GIB:.2f}", cell(f"{layout['engine']} x {layout['world_size']}")
    return [cell(manifest["stage"]), str(manifest["step"]), size, by, str(len(files)), ", ".join(marks)], is_whole


def verify_checkpoints(folder: Path) -> int:
    """Compare all checksums, and say which checkpoints are whole."""
    damaged = 0
    for path in _checkpoints(folder):
        try:
            verify(path)
            print(shown(f"{path}: whole"))
        except (CheckpointError, FileNotFoundError) as error:
            is_there = not _vanishes(path)
            damaged += is_there
            print(shown(str(error) if is_there else f"{path}: removed meanwhile"))
    return 1 if damaged else 0


def _vanishes(path: Path) -> bool:
    """Tell whether a checkpoint that is not whole is gone within a second: a training removes old ones meanwhile."""
    until = time.monotonic() + VANISHES_S
    while path.is_dir() and time.monotonic() < until:
        time.sleep(0.1)
    return not path.is_dir()


def _checkpoints(folder: Path) -> Iterator[Path]:
    places = ("", "checkpoints/", "*/checkpoints/")  # a folder with copies, a stage's folder, or a run directory
    found = [
        path for place in places for path in sorted(folder.glob(f"{place}step_*")) if STEP_FOLDER.fullmatch(path.name)
    ]
    found = [folder] if STEP_FOLDER.fullmatch(folder.name) else found
    if not any(path.is_dir() for path in found):
        raise ValueError(f"there are no checkpoints in {folder}; give a run directory that train wrote.")
    yield from (path.resolve() for path in found)
