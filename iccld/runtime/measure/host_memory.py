"""How much memory the host lets this process have: by the machine, by its control groups (a scheduler's or a
container's, version 1 or 2), and by `ulimit -v`.
"""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEAPS = 4 * 64 * 2**20  # addresses that glibc reserves for the heaps of threads that are yet to start, in bytes
UNLIMITED = 1 << 60  # a control group without a limit says a number like this


class Bound(NamedTuple):
    """`is_shared`: with the other ranks on this host. `total` and `free` in bytes."""

    total: int
    free: int
    is_shared: bool


def bounds() -> list[Bound]:
    machine = _table(Path("/proc/meminfo"))
    found = [Bound(machine["MemTotal"], machine["MemAvailable"], True), *control_groups()]
    limit = _address_limit()
    if limit is not None:
        found.append(Bound(limit, max(limit - process_memory("VmSize") - HEAPS, 0), False))
    return found


def _address_limit() -> int | None:
    """The bytes of addresses that `ulimit -v` allows this process; None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def total_memory() -> int:
    return min(bound.total for bound in bounds())


def free_memory(*, num_sharing: int = 1) -> int:
    """What one of `num_sharing` ranks on this host may still take."""
    return min(bound.free // (num_sharing if bound.is_shared else 1) for bound in bounds())


def taken_memory() -> int:
    """Bytes that count against this process's bounds: its addresses under `ulimit -v`, else what is resident."""
    return process_memory("VmRSS" if _address_limit() is None else "VmSize")


def peak_memory() -> int:
    """The most of `taken_memory` since `restart_peak`; addresses since the process began, which nothing restarts."""
    return process_memory("VmHWM" if _address_limit() is None else "VmPeak")


def process_memory(key: str) -> int:
    """Bytes of this process: `VmRSS` (resident), `VmHWM` (its peak), `VmSize` (addresses), `VmPeak` (their peak)."""
    return _table(Path("/proc/self/status"))[key]


def restart_peak() -> None:
    """`VmHWM` becomes what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def status_lines() -> dict[str, str]:
    """What the kernel says of this process's memory, as it says it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: line.split(":")[1].strip() for line in lines if line.startswith(("Vm", "Rss"))}


def _table(path: Path) -> dict[str, int]:
    """Of lines like `VmRSS:  1024 kB`, in bytes."""
    lines = [line.split() for line in path.read_text().splitlines() if line.endswith(" kB")]
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines}


def control_groups(
    membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> Iterator[Bound]:
    """Of this process's groups and of those around them, each that has a limit."""
    for line in membership.read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = mounted / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = root / place.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and all((folder / name).is_file() for name in names):
                limit, used = ((folder / name).read_text().strip() for name in names)
                if limit != "max" and int(limit) < UNLIMITED:
                    yield Bound(int(limit), int(limit) - int(used) + _reclaimable(folder), True)


def _reclaimable(folder: Path) -> int:
    """Cached files, which the kernel drops before a process goes without."""
    words = (folder / "memory.stat").read_text().split()
    counts = dict(zip(words[::2], words[1::2], strict=True))
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
