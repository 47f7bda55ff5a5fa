"""Properties that must hold on two real ranks; the assertions are in step_worker.py and zero_worker.py."""

from pathlib import Path

import pytest

from tests.distributed.launch import run_module


@pytest.mark.distributed
def test_one_engine_on_two_ranks(tmp_path: Path):
    """Equals two optimisers to the bit, leaves equal weights on all ranks, and scores as one rank does."""
    run_module("tests.distributed.step_worker", str(tmp_path), num_processes=2)
    assert list(tmp_path.iterdir())


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_a_step_of_zero_clips_without_waiting_for_the_device(tmp_path: Path, engine: str):
    run_module("tests.distributed.zero_worker", str(tmp_path), num_processes=2, engine=engine)
    assert len(list(tmp_path.iterdir())) == 2
