"""Compiled steps on two ranks; what is compiled is told by tests/stages/test_compile.py."""

from pathlib import Path

import pytest

from tests.distributed.launch import run_module


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "fsdp2"])
def test_no_rank_compiles_after_warm_up(engine: str, tmp_path: Path):
    run_module("tests.distributed.compile_worker", str(tmp_path), num_processes=2, engine=engine)
    assert len(list(tmp_path.iterdir())) == 2
