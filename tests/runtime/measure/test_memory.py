"""Free memory, by the kernel's own files; and the errors that mean that there is none."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from iccld.runtime.measure import host_memory
from iccld.runtime.measure.host_memory import Bound, control_groups
from iccld.runtime.measure.memory import (
    OutOfMemory,
    free_memory,
    is_out_of_memory,
    limited,
    peak_memory,
    restart_peak,
    taken_memory,
    write_snapshot,
)
from iccld.runtime.settings import MemoryConfig

CPU, MIB = torch.device("cpu"), 2**20


def write(folder: Path, **texts: str) -> None:
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_of_control_groups_of_both_versions(tmp_path: Path) -> None:
    """Those around a group bound it, too; cached files are as good as free."""
    member = tmp_path / "cgroup"
    member.write_text("8:cpu,cpuacct:/job\n4:memory:/slurm/job_7\n0::/system/job_7\n")
    write(tmp_path / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="5000")
    (tmp_path / "memory/memory.stat").write_text("cache 10\ntotal_inactive_file 0\n")
    one = {"memory__usage_in_bytes": "400", "memory__stat": "inactive_file 1\ntotal_inactive_file 30"}
    write(tmp_path / "memory/slurm/job_7", memory__limit_in_bytes="1000", **one)
    write(tmp_path / "system/job_7", memory__max="max", memory__current="7", memory__stat="inactive_file 0")
    (tmp_path / "system/memory.max").write_text("2000\n")
    (tmp_path / "system/memory.current").write_text("500\n")
    (tmp_path / "system/memory.stat").write_text("anon 470\ninactive_file 20\n")
    assert list(control_groups(member, tmp_path)) == [Bound(1000, 630, True), Bound(2000, 1520, True)]


def test_ranks_of_a_host_share_what_is_free() -> None:
    assert 0 < free_memory(CPU, num_sharing=4) < host_memory.free_memory() <= host_memory.total_memory()


def test_the_peak_is_that_since_its_restart() -> None:
    restart_peak(CPU)
    before = taken_memory(CPU)
    big = torch.ones(64 * MIB, dtype=torch.uint8)
    del big
    assert peak_memory(CPU) >= before + 60 * MIB
    restart_peak(CPU)
    assert peak_memory(CPU) < before + 40 * MIB


def test_which_errors_are_out_of_memory() -> None:
    for allocate in (lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        assert is_out_of_memory(raised.value)
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert OutOfMemory.of(raised.value, {}, CPU).asked == "4194304.00 GiB"
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2) + torch.ones(3)
    assert not is_out_of_memory(raised.value)


@contextlib.contextmanager
def addresses_left(size: int) -> Iterator[None]:
    """This process may take so many bytes of addresses more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (host_memory.process_memory("VmSize") + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_primitive_without_memory_for_its_code_is_out_of_memory() -> None:
    """oneDNN says no more; with memory left, there is another reason."""
    error = RuntimeError("could not create a primitive")
    assert not is_out_of_memory(error)
    with addresses_left(100 * MIB):
        assert is_out_of_memory(error)


def test_addresses_count_where_they_are_limited() -> None:
    """Threads that are yet to start reserve some, which are not free to the batch."""
    resident = taken_memory(CPU)
    with addresses_left(1000 * MIB):
        assert taken_memory(CPU) == host_memory.process_memory("VmSize") > resident
        assert peak_memory(CPU) >= taken_memory(CPU)
        assert free_memory(CPU, num_sharing=2) == pytest.approx(744 * MIB, abs=50 * MIB)


def test_a_share_must_be_one() -> None:
    with pytest.raises(ValueError, match=r"memory.share=1.5 must be above 0 and at most 1"):
        MemoryConfig(share=1.5)


@pytest.mark.gpu
def test_on_a_gpu_a_limit_is_met_and_the_allocator_is_written_down(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    restart_peak(device)
    with limited(device, taken_memory(device) + 64 * MIB), pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    found = OutOfMemory.of(raised.value, {}, device)
    assert found.asked == "256.00 MiB" and found.total > 256 * MIB
    path = write_snapshot(tmp_path / "profile/out_of_memory_rank_00000", {}, {})
    assert path.suffix == ".pickle" and path.stat().st_size > 0
    torch.empty(256 * MIB, dtype=torch.uint8, device=device)  # the limit is gone
