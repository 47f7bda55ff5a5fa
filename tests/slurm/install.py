"""SLURM's own packages, installed with apt-get where they are missing; or why they cannot be had."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux"


class Unavailable(RuntimeError):
    """A cluster that cannot be had here; the message says why."""


def install_slurm() -> None:
    """Raises Unavailable. Two test processes do not install at the same time."""
    with Path(tempfile.gettempdir(), f"iccld_slurm_install_{os.getuid()}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _missing():
            return
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise Unavailable(f"{', '.join(_missing())} not found, and only root can do: apt-get install {PACKAGES}")
        # In run level 1 the packages start no daemons of their own.
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        install = f"apt-get update -q && apt-get install -q -y --no-install-recommends {PACKAGES}"
        done = subprocess.run(["sh", "-c", install], check=False, timeout=300, env=environment, capture_output=True)
        if missing := _missing():
            raise Unavailable(f"apt-get could not install {', '.join(missing)}: {done.stderr.decode()[-300:]}")


def has_network_namespaces() -> bool:
    """Tell whether a network namespace can be made, used and removed here."""
    name = f"iccld_try_{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, env={"PATH": PATH}, timeout=20)
        used = subprocess.run(
            ["ip", "netns", "exec", name, "unshare", "-u", "hostname", "x"],
            capture_output=True,
            env={"PATH": PATH},
            timeout=20,
        )
        subprocess.run(["ip", "netns", "del", name], capture_output=True, env={"PATH": PATH}, timeout=20)
    except OSError:
        return False
    return made.returncode == used.returncode == 0


def _missing() -> list[str]:
    return [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
