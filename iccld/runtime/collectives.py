"""All process groups of this rank: how long a collective may take, and how many have begun."""

import os
import re
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from iccld.durable import write_whole
from iccld.runtime.faults.limits import WatchdogConfig

# Of PyTorch's private names, these are used: `_world.pg_map`, `_set_pg_timeout`, `_get_sequence_number_for_group` and
# `_dump_nccl_trace`; there are no public ones.

FAILURE = re.compile(r"gloo|nccl|processgroup|connection (was )?(closed|reset|refused)", re.IGNORECASE)


def groups() -> list[Any]:
    """In the order in which all ranks made them."""
    return list(distributed_c10d._world.pg_map) if torch.distributed.is_initialized() else []


def set_timeout(seconds: float, *, but: Collection[Any] = ()) -> None:
    """Of the collectives that begin from now on, in all groups `but` some."""
    for group in groups():
        if group not in but:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def num_begun() -> list[int]:
    """By group; a rank that has not come to a collective has a smaller number there than those that wait in it."""
    return [group._get_sequence_number_for_group() for group in groups()]


def keep_record() -> None:
    """Before the first group is made: let NCCL remember its last collectives, for `write_record`, and not end the
    process by itself before the watchdog has said whom it waits for.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")  # give up the communicator, go on living
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{2 * WatchdogConfig.collective_s:.0f}")
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")


def write_record(path: Path) -> bool:
    """What NCCL remembers, as PyTorch's flight recorder analyser reads it; False where there is nothing."""
    module: Any = getattr(torch._C, "_distributed_c10d", None)
    uses_nccl = any(torch.distributed.get_backend(group) == "nccl" for group in groups())
    if not uses_nccl or not hasattr(module, "_dump_nccl_trace"):
        return False
    write_whole(path, module._dump_nccl_trace())
    return True


def is_failure(error: BaseException) -> bool:
    """Whether it may be another rank's end that this one met."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(FAILURE.search(str(error)))
