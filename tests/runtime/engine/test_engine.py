"""One rank's engine: the gradients of its micro-batches, to their size, which AdamW's steps hardly depend on."""

import pytest
import torch

from iccld.outcome import AGAIN, status_of
from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import EngineConfig
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
