"""Python processes that start at once: forked from a server that has imported the project and its libraries.

For tests of what happens to processes, not of how they start: a fork has the server's hash seed and its C library, so
what an environment variable tells these has no effect. Nor does a training count its FLOPs there, which is as dear as
ten steps.
"""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "iccld.programs.train.train",
    "iccld.programs.evaluate.evaluate",
    "iccld.programs.profile.profile",
    "iccld.runtime.engine.zero",
    "deepspeed.runtime.zero.muon.original_muon",
    "kornia.enhance",
    "kornia.filters",
    "torch._dynamo",
    "transformers.models.segformer.modeling_segformer",
)


class Forked:
    """`python -m module arguments`, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self, module: str, arguments: list[str], *, environment: dict[str, str], log: Path, folder: Path = ROOT
    ) -> None:
        log.write_bytes(b"")
        self.returncode: int | None = None
        request = {"environment": environment, "log": str(log), "folder": str(folder)}
        self.pid: int = _ask({"start": [module, *arguments], **request})

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status. Raises subprocess.TimeoutExpired."""
        limit = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def _server() -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.forked"]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


def _ask(request: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _serve() -> None:
    """Answer requests until the input ends: the number of a new process, or the exit status of one."""
    with redirect_stdout(sys.stderr):  # deepspeed logs to it, and it carries the answers
        for name in PRELOADED:
            importlib.import_module(name)
    sys.modules["iccld.programs.train.train"]._flops = lambda *_: lambda step: 0.0
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork has the thread that calls it, and the locks of all"
    gc.collect()
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "start" in request:
            answer = os.fork() or _become(request)
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def _become(request: dict[str, Any]) -> NoReturn:
    """Run the module as Python does, in a process that shares nothing with the server."""
    output = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    module, *sys.argv[1:] = request["start"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    raise SystemExit


if __name__ == "__main__":
    _serve()
