"""The node that this process runs on, its name, and for how long it has been up; and its place among the ranks."""

import os
import time
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_name() -> str:
    """Return the node's name as the scheduler knows it, else the machine's."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def launched_world_size() -> int:
    """Return how many ranks the launcher began; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched_rank() -> int:
    """Return which of the launcher's ranks this process is; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


def boot_id() -> str:
    """Return an id of this boot of the machine, new after each one; "" if the kernel tells none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def uptime() -> dict[str, Any]:
    """Return the seconds since this machine's boot (`up_s`), and which boot that was (`boot`); {} if unknown."""
    if not (boot := boot_id()):
        return {}
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return {"boot": boot[:8], "up_s": round(time.clock_gettime(clock), 3)}
