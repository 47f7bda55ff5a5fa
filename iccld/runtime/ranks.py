"""This process among the ranks of a run: its rank, what the ranks agree on, and how long they wait.

Hosts agree on flags and small objects in a process group of their own, so that no device is waited for; background
saves have another one, so that they do not wait for the training.
"""

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from iccld.durable import write_whole
from iccld.node import launched_world_size
from iccld.outcome import Interrupted, ToldByRank0, plain, status_of

# Of PyTorch's private names, these are used: `_world.pg_map`, `_set_pg_timeout`, `_get_sequence_number_for_group` and
# `_dump_nccl_trace`; there are no public ones.

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
NCCL_SILENCE_S = 7200.0  # twice what the watchdog allows a collective by default
LEAVE_S = 180.0  # time for the others to finish, too; one may wait a minute for telemetry
FAILURE = re.compile(r"gloo|nccl|processgroup|connection (was )?(closed|reset|refused)", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """This process's rank, 0 to `world_size - 1`, and the actions of all ranks together; the default is one rank.

    Every rank must call `sum`, `sum_values`, `any`, `gather`, `from_main` and `barrier`, in the same order.
    """

    rank: int = 0
    world_size: int = 1
    host_group: Any = None
    save_group: Any = None

    @classmethod
    def joined(cls, rank: int, world_size: int) -> Self:
        """Make the ranks' groups on the host, once torch's default process group is there. Call on every rank."""
        groups_ = [torch.distributed.new_group(backend="gloo") if world_size > 1 else None for _ in range(2)]
        ranks = cls(rank, world_size, *groups_)
        ranks.set_timeout(COLLECTIVE_TIMEOUT.total_seconds(), of_saves=True)
        return ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks; on one rank, the tensor itself."""
        if self.world_size > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_values(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum same-shaped float tensors over ranks, all in one collective. Ranks must hold the same names."""
        names = sorted(values)
        if not names:
            return {}
        total = self.sum(torch.stack([values[name].detach().float() for name in names]))
        return dict(zip(names, total, strict=True))

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank. The hosts agree on it, so no device is waited for."""
        if self.host_group is None:
            return flag
        tensor = torch.tensor(float(flag))
        torch.distributed.all_reduce(tensor, group=self.host_group)
        return bool(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Return one small picklable value of each rank, on every rank."""
        return self._gather(value, self.host_group)

    def gather_in_background(self, value: Any) -> list[Any]:
        """Gather as `gather` does, for one background thread a rank, while the ranks train."""
        return self._gather(value, self.save_group)

    def _gather(self, value: Any, group: Any) -> list[Any]:
        if group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=group)
        return values

    def from_main(self, value: Any) -> Any:
        """Return rank 0's value, of any size, on every rank; the value that other ranks give does not count."""
        if self.host_group is None:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.gather(None)

    def set_timeout(self, seconds: float, *, of_saves: bool = False) -> None:
        """Set the timeout of future collectives; `of_saves` includes those of background saves."""
        set_timeout(seconds, but=[] if of_saves else [self.save_group])

    def leave(self) -> None:
        """Wait for the others to finish; a rank that is late or gone must not fail the finished ones."""
        set_timeout(LEAVE_S, but=[group for group in groups() if group is not self.host_group])
        with contextlib.suppress(RuntimeError):
            self.barrier()


def groups() -> list[Any]:
    """Return all process groups of this rank, in the order in which all ranks made them."""
    return list(distributed_c10d._world.pg_map) if torch.distributed.is_initialized() else []


def set_timeout(seconds: float, *, but: Collection[Any] = ()) -> None:
    """Set the timeout of future collectives in all groups `but` some."""
    for group in groups():
        if group not in but:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def num_begun() -> list[int]:
    """Count the collectives begun, by group; a rank with a smaller number has not come to where others wait."""
    return [group._get_sequence_number_for_group() for group in groups()]


def keep_record() -> None:
    """Let NCCL remember its last collectives, for `write_record`. Call before the first group is made.

    NCCL then does not end the process by itself before the watchdog has said whom it waits for.
    """
    if torch.cuda.is_available():
        if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1") == "1":  # which torchrun sets unasked
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"  # give up the communicator, go on living
        os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")  # the program itself raises a fault of the device
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{NCCL_SILENCE_S:.0f}")
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")


def write_record(path: Path) -> bool:
    """Write what NCCL remembers, as PyTorch's flight recorder analyser reads it; False where there is nothing."""
    module: Any = getattr(torch._C, "_distributed_c10d", None)
    uses_nccl = any(torch.distributed.get_backend(group) == "nccl" for group in groups())
    if not uses_nccl or not hasattr(module, "_dump_nccl_trace"):
        return False
    write_whole(path, module._dump_nccl_trace())
    return True


def is_failure(error: BaseException) -> bool:
    """Tell whether the error may come from another rank's end."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(FAILURE.search(str(error)))


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn what another rank's end causes within the block into Interrupted; no watchdog looks for it before a run."""
    try:
        yield
    except RuntimeError as error:
        if launched_world_size() < 2 or not is_failure(error):
            raise
        raise Interrupted(
            f"other ranks were lost, or cannot be reached, while the ranks joined ({str(error).splitlines()[0]}); look "
            f"at what they said, and give the same command again."
        ) from error


def together(check: Callable[[], None], ranks: Ranks) -> None:
    """Make a check on every rank; an error of one of them (a damaged index, say) ends all, and is said once."""
    failure: Exception | None = None
    try:
        check()
    except (ValueError, OSError) as error:
        failure = plain(error)
    if found := [failure for failure in ranks.gather(failure) if failure]:
        worst = max(found, key=status_of)
        raise worst if ranks.is_main else ToldByRank0(worst)
