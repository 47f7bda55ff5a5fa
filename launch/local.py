"""Run an iccld verb with N ranks on this machine: `python launch/local.py 2 train experiment=... run_dir=...`.

`--engine zero2` after the number takes another of accelerate_configs/ than ddp.yaml: zero1, zero2 or fsdp2. The ranks
are formed by `accelerate launch`; one rank of DDP needs no launcher. Without a GPU they are CPU ranks over gloo, with
the machine's cores shared among them.
"""

import logging
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("ddp", "zero1", "zero2", "fsdp2")


def main(arguments: list[str]) -> int:
    """Launch and return the exit status of the first rank that failed, or 0."""
    engine = "ddp"
    if len(arguments) > 2 and arguments[1] == "--engine":
        engine, arguments = arguments[2], [arguments[0], *arguments[3:]]
    if len(arguments) < 2 or not arguments[0].isdigit() or int(arguments[0]) < 1 or engine not in ENGINES:
        usage = f"python launch/local.py NUM_RANKS [--engine {'|'.join(ENGINES)}] VERB [ARGUMENTS]"
        print(f"usage: {usage}", file=sys.stderr)
        return 2
    num_ranks = int(arguments[0])
    if num_ranks == 1 and engine == "ddp":
        os.execv(sys.executable, [sys.executable, "-m", "iccld", *arguments[1:]])
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    # A rank says itself what is wrong, in one line; the agent's trace would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The agent passes SIGTERM on, waits up to 30 s for the ranks to save, and would leave them behind on SIGUSR1.
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    options = ["--config_file", str(ROOT / "accelerate_configs" / f"{engine}.yaml")]
    options += ["--num_processes", str(num_ranks), "--main_process_port", "0"]
    try:
        launch_command(launch_command_parser().parse_args([*options, "--module", "iccld", *arguments[1:]]))
    except SignalException as error:
        return 130 if error.sigval is signal.SIGINT else 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != 2:  # not what the user got wrong, which the rank has said
            print(f"launch: rank {rank} ended with exit status {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
