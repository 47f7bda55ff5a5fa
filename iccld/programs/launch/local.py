"""Ranks on this machine, formed by `accelerate launch`."""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed.run  # sets the level of its logger, which `launch` raises
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from iccld.data.processes import usable_cpus
from iccld.outcome import AGAIN, FORCED, REFUSED
from iccld.programs.stopped import WORD, read_word
from iccld.runtime.faults.open_files import check_open_files

LOOPBACK = "127.0.0.1"
HEARD_BY_AGENT = "SIGTERM,SIGINT,SIGQUIT"
SAVE_S = 3600  # for the ranks to save after a signal; each ends itself before, by `preemption.grace_s`


class Loopback(RendezvousHandler):
    """Agent that meets no other; its store, where the ranks meet, listens on the loopback interface alone."""

    def __init__(self, params: RendezvousParameters) -> None:
        self._run_id = params.run_id
        listener = socket.create_server((LOOPBACK, 0), backlog=2048)
        self._port = listener.getsockname()[1]
        self._store = TCPStore(LOOPBACK, self._port, None, True, master_listen_fd=listener.detach())

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def launch(num_ranks: int, engine_file: Path, command: Sequence[str]) -> int:
    """Run the verb on each rank; return the exit status of the first rank that failed, or 0.

    Without a GPU they are CPU ranks over gloo, which share the machine's cores. Raises ValueError.
    """
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(_threads(num_ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    # A rank says itself what is wrong, in one line; the agent's trace would bury it.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # some have a level of their own, not their parent's
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)  # accelerate gives an address that is not used
    _pass_signals_on()
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_S))
    options = ["--config_file", str(engine_file)]
    options += ["--num_processes", str(num_ranks), "--main_process_port", "0", "--rdzv_backend", "loopback"]
    rendezvous_handler_registry.register("loopback", Loopback)
    with tempfile.TemporaryDirectory(prefix="iccld_launch_") as folder:
        os.environ[WORD] = str(word := Path(folder) / "status")
        try:
            check_open_files(num_workers=0, world_size=2 * num_ranks)
            arguments = launch_command_parser().parse_args([*options, "--module", "iccld", *command])
            arguments.signals_to_handle = HEARD_BY_AGENT  # an option of torch's that accelerate's parser lacks
            launch_command(arguments)
        except SignalException as error:
            return _status_of_signalled(error.sigval, read_word(word))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode not in (REFUSED, AGAIN):  # the rank has already explained these
                print(f"launch: rank {rank} ended with exit status {failure.exitcode}", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _pass_signals_on() -> None:
    """Let signals that ask for a stop reach the ranks as SIGTERM; the agent waits for them to save.

    By default it leaves them behind on SIGUSR1, and passes SIGHUP on, which it hears even under `nohup`.
    """
    for number in (signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def _status_of_signalled(number: signal.Signals, left: int | None) -> int:
    """Return the exit status after a signal; `left` is rank 0's, None if it has left none."""
    if left is None:
        print(
            f"launch: {number.name} came, and rank 0 left no exit status; what was saved stays whole", file=sys.stderr
        )
        return FORCED
    return left or (128 + signal.SIGINT if number is signal.SIGINT else 0)


def _threads(num_ranks: int) -> int:
    return max(1, usable_cpus() // num_ranks)
