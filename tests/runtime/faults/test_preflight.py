"""Faults of a node are found before a run, and named with a remedy."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.preflight import (
    SHARED_MEMORY,
    check_collective,
    check_device,
    check_folder,
    check_shared_memory,
    check_space,
    preflight,
)
from iccld.runtime.ranks import Ranks
from iccld.runtime.settings import EngineConfig

CPU = torch.device("cpu")


def test_a_fit_node_passes_and_nothing_is_left(tmp_path: Path) -> None:
    with Engine(EngineConfig()) as engine:
        checks = {
            "device": partial(check_device, CPU),
            "run_dir": partial(check_folder, tmp_path, 0),
            "disk": partial(check_space, tmp_path / "not_yet/there", 1000),
            "collective": partial(check_collective, CPU, engine.ranks),
        }
        assert preflight(checks, engine.ranks) == []
    assert not list(tmp_path.iterdir())


def test_what_was_found_has_a_host_and_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    file = tmp_path / "file"
    file.write_text("")

    def broken() -> None:
        raise RuntimeError("CUDA error:\n  uncorrectable ECC")

    def of_another_set() -> None:
        raise ValueError("the index is of another set")

    with Engine(EngineConfig()) as engine:
        checks = {"device": broken, "run_dir": partial(check_folder, file, 0), "shards": of_another_set}
        device, folder, shards = preflight(checks, engine.ranks)
    assert str(device) == (
        "node7: device: CUDA error: uncorrectable ECC; leave the node out (--exclude), and start again"
    )
    assert folder.host == "node7" and "Not a directory" in folder.what and folder.of_node
    assert not shards.of_node and str(shards).endswith("; mend it, and start again")


class WrongSum(Ranks):
    """Ranks whose network adds wrongly."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2


def test_a_wrong_sum_is_found() -> None:
    with pytest.raises(ValueError, match="the sum over all ranks is 2, not 3"):
        check_collective(CPU, WrongSum(world_size=2))


def test_room_is_asked_for_beyond_what_the_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(bytes(1000))
    check_space(tmp_path, 1000)
    with pytest.raises(ValueError, match=r"needs 1048576.00 GiB .* a smaller stage2.trainer.checkpoint.keep"):
        check_space(tmp_path, 2**50, stage="stage2")


@pytest.mark.parametrize("options", ["size=64k", "size=64k,ro"])
def test_shared_memory_that_does_not_suffice_is_named_with_a_remedy(options: str) -> None:
    program = "from iccld.runtime.faults.preflight import check_shared_memory; check_shared_memory(1 << 20)"
    mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "-rm", "bash", "-c", mount, sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert re.search(
        r"ValueError: /dev/shm does not give the 1.0 MiB that loader workers share \(.*\); mount a larger one "
        r"\(.*--shm-size .*\), .* data.num_workers=0",
        done.stderr,
    ), done.stderr


def test_shared_memory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing does not give the 1.0 MiB .* \(No such file or directory\)"):
        check_shared_memory(1 << 20, tmp_path / "missing")


def test_shared_memory_that_suffices_is_given_back() -> None:
    before = set(SHARED_MEMORY.iterdir())
    check_shared_memory(1 << 20)
    assert set(SHARED_MEMORY.iterdir()) <= before
