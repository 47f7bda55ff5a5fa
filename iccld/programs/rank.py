"""`python -m iccld.programs.rank VERB ...`: one task of a SLURM job step, as one rank.

The step gets its exit status from whichever rank ends first. What became of the work is said by rank 0 alone, in the
file $ICCLD_OUTCOME, and a rank of each node shows in the folder $ICCLD_ALIVE that it lives; the job script reads both.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from iccld import cli
from iccld.runtime.durable import write_text_durably
from iccld.slurm.ranks import interface_towards, rank_environment

EXIT_STATUS, STOPPED = "preemption.exit_status=", 85


def main(argv: Sequence[str]) -> int:
    """Form the rank, run the verb, leave word of its end."""
    os.environ.update(rank_environment(os.environ))
    if interface := interface_towards(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if os.environ["LOCAL_RANK"] == "0" and (folder := os.environ.get("ICCLD_ALIVE")):
        threading.Thread(target=_show_life, args=(Path(folder),), name="alive", daemon=True).start()
    is_main, outcome = os.environ["RANK"] == "0", os.environ.get("ICCLD_OUTCOME")
    if is_main and outcome:
        write_text_durably(Path(outcome).parent / "packages.txt", _packages())
    if argv[0] == "train":
        argv = [*(word for word in argv if not word.startswith(EXIT_STATUS)), f"{EXIT_STATUS}{STOPPED}"]
    status = cli.main(argv)
    if is_main and outcome:
        write_text_durably(Path(outcome), f"{status}\n")
    return 0 if status == STOPPED else status


def _show_life(folder: Path) -> None:
    """A counter that moves several times in the span after which the job script takes silence for death."""
    period_s = float(os.environ.get("ICCLD_SILENCE_S", "60")) / 6
    path, count = folder / f"rank_{os.environ['RANK']}", 0
    while True:
        count += 1
        with contextlib.suppress(OSError):  # a file system may be away for a while
            path.write_text(f"{os.getpid()} {count}\n")
        time.sleep(period_s)


def _packages() -> str:
    """What is installed where the ranks run, a container included."""
    return "".join(sorted({f"{found.metadata['Name']}=={found.version}\n" for found in distributions()}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
