"""One rank's engine: the gradients of its micro-batches, to their size, which AdamW's steps hardly depend on."""

import os
import shutil
from unittest.mock import patch

import pytest
import torch

from iccld.outcome import AGAIN, status_of
from iccld.runtime.engine.compilation import choose_compile, lacks_for_compiling
from iccld.runtime.engine.engine import Engine, _time_to_join
from iccld.runtime.ranks import keep_record
from iccld.runtime.settings import Compile, EngineConfig
from tests.distributed.engine_worker import check_clipping, check_gradients


@pytest.mark.parametrize("num_accumulation", [1, 4])
def test_gradients_are_the_mean_over_the_micro_batches(num_accumulation: int):
    with Engine(EngineConfig()) as engine:
        check_gradients(engine, num_accumulation)


def test_gradients_are_clipped_to_the_norm():
    with Engine(EngineConfig()) as engine:
        check_clipping(engine)


@pytest.mark.parametrize("kind", ["DistNetworkError", "DistStoreError"])
def test_ranks_that_are_lost_while_they_join_are_no_fault_of_the_program(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    def join(*_: object, **__: object) -> None:
        raise getattr(torch.distributed, kind)("The client socket has timed out.\nframe #0: c10")

    monkeypatch.setattr("iccld.runtime.engine.engine.Accelerator", join)
    with pytest.raises(OSError, match=r"other ranks were lost, .* \(The client socket has timed out.\); ") as caught:
        Engine(EngineConfig())
    assert status_of(caught.value) == AGAIN and "\n" not in str(caught.value)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RuntimeError):
        Engine(EngineConfig())


def test_ranks_of_a_job_wait_longer_than_rank_0_that_names_the_missing_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ICCLD_GATHER_S", raising=False)
    assert _time_to_join().total_seconds() == 300
    monkeypatch.setenv("ICCLD_GATHER_S", "1800")
    assert _time_to_join().total_seconds() == 2100


@pytest.mark.parametrize(("wanted", "device"), [("auto", "cpu"), ("none", "cuda"), ("none", "cpu")])
def test_where_nothing_is_compiled_nothing_can_lack(wanted: str, device: str) -> None:
    assert choose_compile(Compile[wanted], device, lacks="gcc is not on PATH") is Compile.none


def test_auto_compiles_nothing_where_it_cannot_and_another_choice_is_refused() -> None:
    assert choose_compile(Compile.auto, "cuda", lacks="") is Compile.blocks
    assert choose_compile(Compile.auto, "cuda", lacks="gcc is not on PATH") is Compile.none
    with pytest.raises(ValueError, match=r"engine.compile=blocks: .* gcc is not on PATH; or set engine.compile=none"):
        choose_compile(Compile.blocks, "cpu", lacks="gcc is not on PATH")


def test_what_a_machine_lacks_for_compiling_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert lacks_for_compiling("cpu") == "g++ is not on PATH (install g++, or set CXX)"
    assert "gcc or clang is not on PATH (install gcc, or set CC)" in lacks_for_compiling("cuda")
    with pytest.raises(ValueError, match=r"engine.compile=blocks: torch.compile cannot work"):
        Engine(EngineConfig(compile=Compile.blocks))


@pytest.mark.parametrize(("given", "kept"), [(None, "2"), ("1", "2"), ("0", "0"), ("3", "3")])
def test_nccl_ends_no_process_unless_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    """torchrun sets 1 by itself."""
    with patch.dict(os.environ):
        os.environ.pop("TORCH_NCCL_ASYNC_ERROR_HANDLING", None)
        os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": given} if given else {}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        keep_record()
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == kept
        assert os.environ["TORCH_NCCL_RETHROW_CUDA_ERRORS"] == "0"
