"""`iccld report RUN_DIR...`: one HTML page of a run, or of several side by side."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from iccld.durable import make_folder, write_whole
from iccld.programs.report.page import page
from iccld.programs.run.record import read_records
from iccld.schema import flat

DESCRIPTION = """\
Write one HTML page of a run: curves, scores by class, time, warnings, pictures, settings, checkpoints, restarts.
Several runs stand side by side, with the settings in which they differ. The page needs no network and no other file.
Unfinished runs are shown as far as they are. Exit status: 0, or 2 where there is no run.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `iccld report`."""
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="(RUN_DIR/report/report.html, of one run)")


def run(arguments: Namespace) -> int:
    """Write the page and print its path. Raises ValueError if there is no run, or no place for several runs' page."""
    run_dirs, output = arguments.run_dirs, arguments.output
    if output is None and len(run_dirs) > 1:
        raise ValueError("--output must name the page of several runs; give it, as in --output runs/report.html.")
    records = read_records(run_dirs)
    if output is None:
        output = make_folder(run_dirs[0] / "report", within=run_dirs[0]) / "report.html"
    elif output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file in it, as {output / 'report.html'}.")
    text = page(records, _defaults())
    make_folder(output.parent, within=output.parent)
    write_whole(output, text)
    print(output, flush=True)
    return 0


def _defaults() -> dict[str, object]:
    from iccld.config import Config, to_dict  # and with it torch, which nothing else here needs

    return flat(to_dict(Config()))
