"""Checks of seconds before a run: a fault of a node is reported with its name, not met an hour later.

A check does something small, and raises ValueError, OSError or RuntimeError if it fails.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from iccld.durable import write_whole
from iccld.node import host_name
from iccld.runtime.measure.memory import gib
from iccld.runtime.ranks import Ranks

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Finding:
    """Result of a failed check. `of_node`: other nodes did not find it, or checks of this kind are about the node."""

    host: str
    check: str
    what: str
    of_node: bool

    def __str__(self) -> str:
        remedy = "leave the node out (--exclude), and start again" if self.of_node else "mend it, and start again"
        return f"{self.host}: {self.check}: {self.what.rstrip('.')}; {remedy}"


def preflight(checks: Mapping[str, Callable[[], None]], ranks: Ranks) -> list[Finding]:
    """Do all checks on every rank; return the findings, one for each host and check, the same on every rank.

    A check named `device` or `collective` is always of the node; on one host, so is what the system refuses (OSError).
    `collective` comes last, if all others went well.
    """
    found = _share({name: _try(check) for name, check in checks.items() if name != "collective"}, ranks)
    if not found and "collective" in checks:
        found = _share({"collective": _try(checks["collective"])}, ranks)
    return found


def _try(check: Callable[[], None]) -> tuple[str, bool]:
    """Say what is wrong, and whether the system has said so."""
    try:
        check()
    except (ValueError, OSError, RuntimeError) as error:
        return " ".join(str(error).split()) or repr(error), isinstance(error, OSError)
    return "", False


def _share(outcomes: Mapping[str, tuple[str, bool]], ranks: Ranks) -> list[Finding]:
    of_ranks = ranks.gather((host_name(), dict(outcomes)))
    hosts = {host for host, _ in of_ranks}
    found: dict[tuple[str, str], Finding] = {}
    for host, outcome in of_ranks:
        for name, (what, is_system) in outcome.items():
            where = {other for other, of_other in of_ranks if of_other[name][0]}
            if what:
                of_node = name in ("device", "collective") or where != hosts or (is_system and len(hosts) == 1)
                found.setdefault((host, name), Finding(host, name, what, of_node))
    return list(found.values())


def check_device(device: torch.device) -> None:
    """Allocate, multiply, and compare with what the host computes."""
    ones = torch.arange(256.0).remainder(7).repeat(256, 1)
    expected, product = ones @ ones.T, (ones.to(device) @ ones.T.to(device)).cpu()
    if not torch.equal(product, expected):  # small integers: exact in every precision
        raise ValueError(f"{device} multiplies wrongly")


def check_collective(device: torch.device, ranks: Ranks) -> None:
    total = ranks.sum(torch.full((1024,), float(ranks.rank + 1), device=device))
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    if not bool((total == expected).all()):
        raise ValueError(f"the sum over all ranks is {float(total[0]):g}, not {expected:g}")


def check_folder(folder: Path, rank: int) -> None:
    """Check that each rank can write there."""
    probe = folder / f".preflight_{rank:05d}"
    write_whole(probe, os.urandom(1024), durably=False)
    probe.unlink()


def check_space(folder: Path, needed: int, *, stage: str = "stageN") -> None:
    """Check that there is room for `needed` bytes, with what the folder already holds counted in."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    near = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(near).free
    if free + held < needed:
        raise ValueError(
            f"{folder} needs {gib(needed)} for checkpoints, {gib(free + held)} are free; "
            f"make room, set a smaller {stage}.trainer.checkpoint.keep, or use another run_dir"
        )


def check_shared_memory(needed: int, folder: Path = SHARED_MEMORY) -> None:
    """Check that `needed` bytes can be taken, as loader workers do for batches and locks."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        raise ValueError(
            f"{folder} does not give the {needed / 2**20:.1f} MiB that loader workers share ({error.strerror}); mount "
            f"a larger one (in containers: --shm-size or --ipc=host), set fewer data.num_workers, or "
            f"data.num_workers=0, which needs none"
        ) from error
