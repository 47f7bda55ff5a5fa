"""`iccld doctor`: its arguments, and the report on this machine and on a run's needs."""

import argparse

from iccld.programs.arguments import add_settings

DESCRIPTION = """\
Try what a run needs of this machine, and print what fits, what does not, and what to do. With the settings of a run,
its folder, shards and room for checkpoints are tried too. The report can be pasted into a bug report.

  iccld doctor experiment=gta5_to_cityscapes run_dir=runs/a

Exit status: 0 nothing is wrong, 2 something must be mended, 75 another machine may do.
"""
add_arguments = add_settings


def run(arguments: argparse.Namespace) -> int:
    """Print the report, and return the exit status."""
    from iccld.programs.doctor.examine import report

    return report(arguments.overrides, config_dir=arguments.config_dir)
