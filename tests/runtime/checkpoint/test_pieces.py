"""State is stored as runs of flattened tensors; however it was cut, it reads back to the bit."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from iccld.runtime.checkpoint.errors import DamagedError
from iccld.runtime.checkpoint.pieces import (
    SAFETENSORS_DTYPES,
    Run,
    TensorReader,
    join_tables,
    share_out,
    whole,
    write_runs,
)

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=5)


def tensors_of(sizes: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.arange(math.prod(size), dtype=torch.float32).view(size) + i for i, size in enumerate(sizes)}


@settings(max_examples=40, deadline=None)
@given(sizes=shapes, world_size=st.integers(1, 7), cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_shared_out_over_any_number_of_ranks_it_reads_back_whole_and_in_part(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, ...]], world_size: int, cut: tuple[float, float]
):
    folder, tensors = tmp_path_factory.mktemp("pieces"), tensors_of(sizes)
    runs = {name: whole(tensor) for name, tensor in tensors.items()}
    parts = [share_out(runs, rank=rank, world_size=world_size) for rank in range(world_size)]
    counts = [sum(len(run.data) for run in part.values()) for part in parts]
    assert max(counts) - min(counts) <= 1
    tables = [write_runs(folder / f"rank_{rank}.safetensors", part)["tensors"] for rank, part in enumerate(parts)]
    reader = TensorReader(folder, join_tables(tables))
    assert set(reader.names()) == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name), tensor) and reader.shape(name) == tuple(tensor.shape)
        start, stop = sorted(round(share * tensor.numel()) for share in cut)
        assert torch.equal(reader.read(name, start, stop), tensor.flatten()[start:stop])


@pytest.mark.parametrize("dtype", list(SAFETENSORS_DTYPES))
def test_every_dtype_is_kept_and_safetensors_reads_the_file(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
        "x": torch.arange(6).to(dtype),
    }
    facts = write_runs(tmp_path / "a.safetensors", {name: whole(tensor) for name, tensor in tensors.items()})
    assert facts["size"] == (tmp_path / "a.safetensors").stat().st_size
    loaded = load_file(tmp_path / "a.safetensors")
    reader = TensorReader(tmp_path, join_tables([facts["tensors"]]))
    for name, tensor in tensors.items():
        assert torch.equal(loaded[f"{name}@0"], tensor.flatten())
        assert reader.tensor(name).dtype is dtype and torch.equal(reader.tensor(name), tensor)


@pytest.mark.parametrize(
    ("starts", "message"),
    [((0, 2), "stored up to element 3 and from element 2"), ((0, 4), "up to element 3 and from element 4"),
     ((0,), "stored up to element 3 of 6")],
)  # fmt: skip
def test_overlaps_and_gaps_are_refused(tmp_path: Path, starts: tuple[int, ...], message: str):
    runs = [{"w": Run((2, 3), start, torch.zeros(3))} for start in starts]
    tables = [write_runs(tmp_path / f"{i}.safetensors", run)["tensors"] for i, run in enumerate(runs)]
    with pytest.raises(ValueError, match=message):
        join_tables(tables)


def test_a_file_that_does_not_hold_what_its_table_says_is_damage(tmp_path: Path):
    facts = write_runs(tmp_path / "a.safetensors", {"w": whole(torch.arange(6.0))})
    longer = {"w": {**facts["tensors"]["w"], "shape": [8], "pieces": [["a.safetensors", 0, 8]]}}
    with pytest.raises(DamagedError, match=r"a\.safetensors holds too little of w@0"):
        TensorReader(tmp_path, longer).tensor("w")
    (tmp_path / "a.safetensors").write_bytes(b"garbage!")
    with pytest.raises(DamagedError, match=r"damaged: a\.safetensors holds no w@0"):
        TensorReader(tmp_path, facts["tensors"]).tensor("w")


def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path):
    table = write_runs(tmp_path / "a.safetensors", {"module/w": whole(torch.zeros(2, 3))})["tensors"]
    reader = TensorReader(tmp_path, table)
    with pytest.raises(ValueError, match=r"holds no module/v; it is of another model"):
        reader.tensor("module/v")
    with pytest.raises(ValueError, match=r"module/w has shape \(2, 3\), not \(3, 3\)"):
        reader.fill("module/w", whole(torch.zeros(3, 3)))
