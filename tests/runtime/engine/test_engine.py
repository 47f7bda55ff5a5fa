"""One rank's engine: the gradients of its micro-batches, to their size, which AdamW's steps hardly depend on."""

import pytest

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
