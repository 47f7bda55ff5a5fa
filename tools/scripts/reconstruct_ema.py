"""Give a finished stage's model another average of its weights (relative width 0.05: the last 5 % or so of training).

python tools/scripts/reconstruct_ema.py runs/a --stage stage2 --width 0.03 --output runs/a/ema_0.03
python tools/scripts/reconstruct_ema.py runs/a --stage stage2 --sweep 0.02,0.05,0.10,0.15 --json sweep.json

The run must have kept averages: ema_profile.widths=[0.05,0.10] and ema_profile.snapshot_every of its stage. The
sweep takes settings of the evaluation, as inference.num_steps=[4].
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.markup import escape

from iccld.evaluation import results_table
from iccld.programs.evaluate.averaging import sweep, write_reconstruction
from iccld.programs.evaluate.evaluate import saved_settings
from iccld.stages.table import STAGES
from iccld.tables import table_console


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the sweep's evaluation")
    parser.add_argument("--stage", choices=[*STAGES], required=True)
    parser.add_argument("--step", type=int, default=0, help="the step of a snapshot; 0 (default): the last one's")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--width", type=float, help="write a model of this relative width")
    what.add_argument("--sweep", help="score these relative widths, as in 0.02,0.05,0.10,0.15")
    parser.add_argument("--output", type=Path, help="of --width: a new model folder")
    parser.add_argument("--json", type=Path, help="of --sweep: a file for the scores")
    arguments = parser.parse_intermixed_args(argv)  # settings may stand at either end
    if (arguments.width is None) != (arguments.output is None):
        parser.error("--width and --output belong together")
    return arguments


def read_widths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--sweep {text} must be numbers with commas between them, as in 0.02,0.05,0.10.") from None


def score_widths(arguments: argparse.Namespace) -> None:
    config = saved_settings(arguments.run_dir, arguments.overrides)
    widths = read_widths(arguments.sweep)
    rows = sweep(config, arguments.stage, widths=widths, step=arguments.step)
    named = {f"{row['weights']} x{steps}": scores for row in rows for steps, scores in row["scores"].items()}
    table_console().print(results_table(named, title=escape(str(arguments.run_dir))))
    for row in rows[1:]:
        print(f"{row['weights']} after {row['step']} steps: the profile is met to {row['profile_error']:.2%}")
    if arguments.json:
        plain: list[dict[str, Any]] = [
            row | {"scores": {str(steps): scores.to_json() for steps, scores in row["scores"].items()}} for row in rows
        ]
        figures = {"run_dir": str(arguments.run_dir), "stage": arguments.stage, "rows": plain}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.sweep is not None:
        score_widths(arguments)
        return
    stage, step = arguments.stage, arguments.step
    error = write_reconstruction(arguments.run_dir, stage, arguments.output, width=arguments.width, step=step)
    print(f"{arguments.output}: relative width {arguments.width}; the profile is met to {error:.2%}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"reconstruct_ema: {error}")
