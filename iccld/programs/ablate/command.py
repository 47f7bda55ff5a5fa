"""`iccld ablate`: its arguments, and its work: train, then report."""

import argparse
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from iccld.node import launched_world_size

if TYPE_CHECKING:
    from iccld.programs.ablate.rows import Ablation

DESCRIPTION = """\
Train each run of a grid with each seed, compare the runs with a baseline, and write FOLDER/report.md, summary.json and
pictures. The same command goes on, and trains no finished run again.

  iccld ablate GRID.yaml --output runs/ablation
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `iccld ablate`."""
    parser.add_argument("grid", type=Path, metavar="GRID.yaml", help="baseline, seeds, common settings and runs")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the runs and the report")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="ranks of a run (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show what is left and the commands, and train nothing")
    parser.add_argument("--report-only", action="store_true", help="report what is finished, and train nothing")
    about = "submit what is left as job arrays; a YAML file with the options of `iccld submit`"
    parser.add_argument("--slurm", type=Path, metavar="SETTINGS.yaml", help=about)
    parser.add_argument("--no-pictures", action="store_true", help="no sample pictures of the validation set")


def run(arguments: argparse.Namespace) -> int:
    """Train what is left, then report. Raises ValueError if the user erred."""
    from iccld.programs.ablate.grid import read_grid
    from iccld.programs.ablate.rows import open_ablation

    if launched_world_size() > 1:
        raise ValueError("ablate begins runs, and is no rank of one; use `iccld ablate --ranks R ...`.")
    for name in ("processes", "ranks"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be at least 1.")
    _refuse_beside_slurm(arguments)
    typed = shlex.join(["iccld", "ablate", str(arguments.grid), "--output", str(arguments.output)])
    options = f" --ranks {arguments.ranks}" if arguments.ranks > 1 else ""
    ablation = open_ablation(
        read_grid(arguments.grid), arguments.output, num_ranks=arguments.ranks, command=typed + options
    )
    if arguments.slurm:
        return _submit(ablation, arguments)
    if arguments.dry_run:
        return _print_states(ablation)
    if arguments.report_only:
        return _report(ablation, arguments)
    return _train(ablation, arguments)


def _refuse_beside_slurm(arguments: argparse.Namespace) -> None:
    """Refuse options of training and reporting here where jobs are submitted. Raises ValueError."""
    options = {
        f"--processes {arguments.processes}": arguments.processes > 1,
        "--no-pictures": arguments.no_pictures,
        "--report-only": arguments.report_only,
    }
    if arguments.slurm and (given := [option for option, is_given in options.items() if is_given]):
        raise ValueError(f"{', '.join(given)} with --slurm: nothing is trained or reported here; leave one out.")


def _print_states(ablation: "Ablation") -> int:
    from iccld.programs.ablate.running import states_of
    from iccld.programs.ablate.tasks import tasks_of

    states = states_of(ablation)
    for task, needed in tasks_of(ablation.grid).items():
        print(f"{task}: {states[task].value}{f', after {needed}' if needed else ''}")
        print(f"  {ablation.shown(task)}")
    return 0


def _submit(ablation: "Ablation", arguments: argparse.Namespace) -> int:
    from iccld.programs.ablate.arrays import submit_rows
    from iccld.runtime.faults.lock import locked

    if arguments.dry_run:
        return submit_rows(ablation, settings=arguments.slurm, dry_run=True)
    with locked(ablation.folder) as holder:
        if holder:
            raise ValueError(f"{ablation.folder} is in use by {holder}; wait for it, end it, or use another --output.")
        return submit_rows(ablation, settings=arguments.slurm)


def _train(ablation: "Ablation", arguments: argparse.Namespace) -> int:
    from iccld.programs.ablate.running import train_rows
    from iccld.runtime.faults.lock import locked

    with locked(ablation.folder) as holder:
        if holder:
            raise ValueError(f"{ablation.folder} is in use by {holder}; wait for it, end it, or use another --output.")
        ending = train_rows(ablation, num_processes=arguments.processes)
        if ending.signal:
            name = signal.Signals(ending.signal).name
            print(f"iccld ablate: stopped by {name}; the same command goes on", flush=True)
            return ending.status
        _report(ablation, arguments)
    if ending.failures:
        print(f"iccld ablate: not finished: {', '.join(map(str, ending.failures))}", flush=True)
    return ending.status


def _report(ablation: "Ablation", arguments: argparse.Namespace) -> int:
    from iccld.programs.ablate.report import write_report

    write_report(ablation, pictures=not arguments.no_pictures)
    return 0
