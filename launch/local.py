"""Run an iccld verb with N ranks on this machine: `python launch/local.py 2 train experiment=... run_dir=...`.

The ranks are formed by `accelerate launch` from accelerate_configs/ddp.yaml (cpu.yaml for one). Without a GPU they are
CPU ranks over gloo, with the machine's cores shared among them.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    """Launch and return the exit status of the first rank that failed, or 0."""
    if len(arguments) < 2 or not arguments[0].isdigit() or int(arguments[0]) < 1:
        print("usage: python launch/local.py NUM_RANKS VERB [ARGUMENTS]", file=sys.stderr)
        return 2
    num_ranks = int(arguments[0])
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if num_ranks == 1 else "ddp.yaml")
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    # A rank says itself what is wrong, in one line; the agent's trace would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = ["--config_file", str(config), "--num_processes", str(num_ranks), "--main_process_port", "0"]
    try:
        launch_command(launch_command_parser().parse_args([*options, "--module", "iccld", *arguments[1:]]))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
