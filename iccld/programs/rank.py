"""`python -m iccld.programs.rank VERB ...`: one task of a SLURM job step, as one rank.

The step gets its exit status from the rank that ends first. Rank 0 alone writes the outcome of the work, into the file
$ICCLD_OUTCOME, and a rank of each node shows in the folder $ICCLD_ALIVE that it lives; the job script reads both.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from iccld import cli
from iccld.durable import write_whole
from iccld.node import host_name
from iccld.outcome import REFUSED, say, words
from iccld.programs.stopped import STOPPED
from iccld.runtime.faults.ending import run_to_the_end
from iccld.runtime.faults.preemption import SIGNALS, STOPPED_BY_WATCHDOG
from iccld.slurm.ranks import interface_towards, missing_gpus, rank_environment


def main(argv: Sequence[str]) -> int:
    """Form the rank, run the verb, and write down its outcome."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the verb can hear them
    os.environ.update(rank_environment(os.environ))
    if interface := interface_towards(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    is_main, outcome = os.environ["RANK"] == "0", os.environ.get("ICCLD_OUTCOME")
    with contextlib.suppress(ImportError):  # which the verb explains
        import torch  # before the first sign of life: no thread can give one while a large library is loaded

        if missing := missing_gpus(os.environ, num_seen=torch.cuda.device_count()):
            return _end_without_gpus(missing, outcome)
    if folder := os.environ.get("ICCLD_ALIVE"):
        threading.Thread(target=_show_life, args=(Path(folder),), name="alive", daemon=True).start()
        if is_main and outcome and "ICCLD_GATHER_S" in os.environ:
            awaits = (Path(folder), Path(outcome).parents[2])
            threading.Thread(target=_await_others, args=awaits, name="awaits", daemon=True).start()
    if is_main and outcome:
        _leave(Path(outcome).with_name("packages.txt"), _packages())
    try:
        status = cli.main(argv)
    except SystemExit as end:  # of a command that cannot be parsed
        status = end.code if isinstance(end.code, int) else 1
    if is_main and outcome:
        _leave(Path(outcome), f"{status}\n")
    return 0 if status == STOPPED else status


def _end_without_gpus(what: str, outcome: str | None) -> int:
    """Name this node, so that the job goes on elsewhere; without CUDA in torch, no other node would do."""
    from torch.version import cuda, hip

    from iccld.runtime.measure.telemetry import write_event

    if not (cuda or hip):
        say(f"iccld: {what}: this torch is made for CPUs; install one with CUDA, or set CUDA_VISIBLE_DEVICES= (empty).")
        status = REFUSED
    else:
        say(f"iccld: {host_name()}: {what}")
        if outcome:
            write_event(Path(outcome).parents[2], "unfit", host=host_name(), check="device", what=what)
        status = STOPPED_BY_WATCHDOG
    if outcome and os.environ["RANK"] == "0":
        _leave(Path(outcome), f"{status}\n")
    return status


def _leave(path: Path, text: str) -> None:
    """Write a word for others; a failure to write is reported, and changes nothing of the work."""
    try:
        write_whole(path, text)
    except OSError as error:
        say(f"iccld: {words(error)}")


def _show_life(folder: Path) -> None:
    """Write a file for this rank; the file of a node's first rank holds a counter that moves.

    It moves several times in the span after which the job script takes silence for death.
    """
    period_s = float(os.environ.get("ICCLD_SILENCE_S", "60")) / 6
    path, count = folder / f"{host_name()}_{os.environ['RANK']}", 0
    while True:
        count += 1
        with contextlib.suppress(OSError):  # a file system may be away for a while
            write_whole(path, f"{os.getpid()} {count}\n", durably=False)
            if os.environ["LOCAL_RANK"] != "0":
                return
        time.sleep(period_s)


def _await_others(folder: Path, run_dir: Path) -> None:
    """Name the nodes of missing ranks, and end, if ranks are missing so long after the first began."""
    time.sleep(float(os.environ["ICCLD_GATHER_S"]))
    there = {path.name for path in folder.glob("[!.]*")}
    ranks = {int(name.rpartition("_")[2]) for name in there}
    if not (missing := sorted(set(range(int(os.environ["WORLD_SIZE"]))) - ranks)):
        return
    hosts = set(os.environ.get("ICCLD_HOSTS", "").split()) - {name.rpartition("_")[0] for name in there}
    on = f", none on {', '.join(sorted(hosts))}" if hosts else ""
    what = f"{len(missing)} ranks have not begun (the first is rank {missing[0]}){on}"
    say(f"iccld: {what}")
    from iccld.runtime.measure.telemetry import write_event

    for host in sorted(hosts):
        write_event(run_dir, "unfit", host=host, check="start", what=what)
    os._exit(STOPPED_BY_WATCHDOG)


def _packages() -> str:
    """List the packages that are installed where the ranks run, a container included."""
    return "".join(sorted({f"{found.metadata['Name']}=={found.version}\n" for found in distributions()}))


if __name__ == "__main__":
    run_to_the_end(lambda: main(sys.argv[1:]))
