"""Power-function averages of shards, on two ranks, against those of the whole."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from iccld.uda.ema_profile import PowerAverages


def _average_shards(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    # Uneven on two ranks: 3 + 2 rows, and 1 + 0.
    students = {
        name: torch.randn(20, *shape, generator=torch.Generator().manual_seed(1))
        for name, shape in {"w": (5, 3), "b": (1,)}.items()
    }

    def sharded(step: int) -> dict[str, Tensor]:
        return {name: distribute_tensor(value[step], mesh, [Shard(0)]) for name, value in students.items()}

    whole, shards = (
        PowerAverages(first, [0.05, 0.10]) for first in ({n: v[0] for n, v in students.items()}, sharded(0))
    )
    for step in range(20):
        whole.update({name: value[step] for name, value in students.items()}, step)
        shards.update(sharded(step), step)
        if step == 10:  # resumed, as the engine does: filled in place
            resumed = PowerAverages(sharded(3), [0.05, 0.10])
            for name, tensor in resumed.state_dict().items():
                tensor.copy_(shards.state_dict()[name])
            shards = resumed
    for name, tensor in shards.state_dict().items():
        assert isinstance(tensor, DTensor) and tensor.dtype == torch.float32
        assert torch.equal(tensor.full_tensor(), whole.state_dict()[name]), name
    Path(folder, f"rank_{rank}").touch()
    torch.distributed.barrier()  # a rank that leaves while another is in a collective aborts it
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_averages_of_shards_are_shards_of_the_averages(tmp_path: Path):
    multiprocessing.spawn(_average_shards, args=(2, str(tmp_path)), nprocs=2)
    assert {path.name for path in tmp_path.glob("rank_*")} == {"rank_0", "rank_1"}
