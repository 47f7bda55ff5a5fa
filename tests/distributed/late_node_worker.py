"""Called on two ranks, of which the second sees no finished stage, as on a node that remembers an older folder."""

import os
from pathlib import Path

from iccld.config import load_config
from iccld.programs.train import train


def main(done: str, *overrides: str) -> None:
    train._flops = lambda *_: lambda step: 0.0  # counting takes as long as ten steps
    if os.environ["RANK"] == "1":
        train.finished_models = lambda config: []
    assert train.train(load_config(list(overrides)))
    Path(done).touch()
