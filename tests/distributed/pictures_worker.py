"""Called on two ranks that hold shards: what fails on one of them leaves no picture, and ends no training."""

from pathlib import Path
from typing import Any

import torch

from iccld.config import load_config
from iccld.programs.train import pictures, train


def failing(function: Any, on_rank: int) -> Any:
    """Fail on one rank, before it does what the function does."""

    def call(*given: Any) -> Any:
        if given[-1].ranks.rank == on_rank:
            raise torch.OutOfMemoryError(f"no room on rank {on_rank}")
        return function(*given)

    return call


def main(done: str, *overrides: str) -> None:
    train._flops = lambda *_: lambda step: 0.0  # counting takes as long as ten steps
    whole = pictures.stage_for_whole_weights
    for name, on_rank in (("drawn", -1), ("one", 1)):
        pictures.stage_for_whole_weights = failing(whole, on_rank)
        assert train.train(load_config([*overrides, f"run_dir={done}/{name}"]))
    pictures.stage_for_whole_weights = whole
    Path(done, "done").touch()
