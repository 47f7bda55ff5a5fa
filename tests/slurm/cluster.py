"""A real slurmctld and several slurmd on this machine, started, used and stopped.

`Cluster` gives each node a port of its own; all nodes are this machine, and their names (n1, n2, ...) do not resolve.
`NamespaceCluster` (namespaces.py) gives each an address, a host name and a link that can be cut.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from tests.ports import claimed, free_ports
from tests.slurm.install import PATH

START_S = 30.0
_CONFIG = """
ClusterName=iccld
SlurmctldHost={controller}
SlurmctldPort={controller_port}
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd_%n.pid
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool_%n
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd_%n.log
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_min_interval=100000
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
MessageTimeout=10
ReturnToService=2
MinJobAge=3600
MpiDefault=none
JobRequeue=1
FirstJobId={first_job}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A context manager. Daemons are stopped by their process ids, and die with the test process."""

    def __init__(self, *, num_nodes: int = 4) -> None:
        self.names = [f"n{i + 1}" for i in range(num_nodes)]
        self.home = Path(tempfile.mkdtemp(prefix="slurm_"))  # its path must be short
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "ACCELERATE"))},
            "PATH": PATH,
            "SLURM_CONF": str(self.home / "slurm.conf"),
            "SLURM_TIME_FORMAT": "%s",
        }

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for folder in ("state", "munge"):
            (self.home / folder).mkdir(mode=0o700)
        key = self.home / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.home / "slurm.conf").write_text(self.config())
        (self.home / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # without the line slurmd dies
        munge = self.home / "munge"
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "log-file": munge / "log"}
        options = [f"--{name}={path}" for name, path in {**files, "seed-file": munge / "seed"}.items()]
        self.daemon("munged", ["munged", "--foreground", "--force", *options])
        wait_until((munge / "socket").exists, START_S, "munged's socket")
        self.daemon("slurmctld", [*self.on_controller(), "slurmctld", "-D", "-i"])
        for name in self.names:
            self.start_node(name)
        wait_until(lambda: self.states().count("idle") == len(self.names), START_S, "idle nodes", self.tail)

    def config(self) -> str:
        host = socket.gethostname()
        ports = free_ports(len(self.names) + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        return config_text(self.home, f"{host}(127.0.0.1)", ports[0], nodes)

    def on_controller(self) -> list[str]:
        """Return the words before a command that runs where the controller runs."""
        return []

    def on_node(self, name: str) -> list[str]:
        return []

    def start_node(self, name: str) -> None:
        self.daemon(name, [*self.on_node(name), "slurmd", "-D", "-N", name])

    def daemon(self, name: str, command: Sequence[str]) -> None:
        with (self.home / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def stop(self) -> None:
        """Every daemon, then every process that still belongs to a job."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            if "slurmctld" in self.daemons:
                self.run("scancel", "--user=root", "--signal=KILL", "--full", timeout_s=5)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)

    def processes(self, node: str = "", *, program: str = "") -> list[int]:
        """Living processes of this cluster's jobs (of one node), whose command line holds `program`."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                line = (folder / "cmdline").read_bytes()
                mine = f"SLURM_CONF={self.home}/slurm.conf".encode() in variables and b"SLURM_JOB_ID=" in b"".join(
                    variables
                )
                here = not node or f"SLURMD_NODENAME={node}".encode() in variables
                if mine and here and line and program.encode() in line:
                    found.append(int(folder.name))
        return found

    def step_daemons(self, node: str) -> list[int]:
        """The slurmstepd of the node's job steps, but the batch step's."""
        found = []
        for pid in self.processes(node, program="iccld.programs.rank"):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.append(parent)
        return found

    def run(self, *command: str, timeout_s: float = 60, check: bool = True) -> str:
        """Run a client's command, and return what it prints."""
        done = subprocess.run(
            [*self.on_controller(), *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    def states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split()

    def fact(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def wait(self, job: str, *states: str, timeout_s: float = 120) -> str:
        """Until the job is in one of the states, by default an end; returns which."""
        ends = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY")
        wait_until(lambda: self.fact(job, "JobState") in ends, timeout_s, f"job {job} in {ends}", self.tail)
        return self.fact(job, "JobState")

    def tail(self) -> str:
        """Return the last lines of the daemons and the jobs, for a test that waited in vain."""
        logs = [*self.home.glob("slurmctld.log"), *self.home.glob("slurmd_*.log")]
        said = "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in sorted(logs))
        return f"{self.run('squeue', '--all', check=False)}\n{said}"


def config_text(home: Path, controller: str, port: int, nodes: str) -> str:
    """slurm.conf; the shortest of SLURM's waits, since tests wait for them."""
    first_job = 1 + 500 * next(claimed("slurm_jobs", range(39)))  # jobs, and so ports, of its own
    return _CONFIG.format(home=home, controller=controller, controller_port=port, nodes=nodes, first_job=first_job)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, tail: Callable[[], str] = str) -> None:
    limit = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > limit:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}\n{tail()}")
        time.sleep(0.1)
