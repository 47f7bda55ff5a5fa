"""The node that this process runs on: its name, and for how long it has been up."""

import os
import time
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_name() -> str:
    """The node's name as the scheduler knows it, else the machine's."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def boot_id() -> str:
    """A name of this machine as it runs now, new after each boot; "" where the kernel tells none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def uptime() -> dict[str, Any]:
    """Seconds since this machine's boot (`up_s`), and which boot that was (`boot`); empty where that is not known."""
    if not (boot := boot_id()):
        return {}
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return {"boot": boot[:8], "up_s": round(time.clock_gettime(clock), 3)}
