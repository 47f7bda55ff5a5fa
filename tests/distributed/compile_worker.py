"""One rank: both stages, compiled, train as they do eagerly, and no graph is made after warm-up."""

import sys
from pathlib import Path

import pytest
import torch

from iccld.runtime.engine import compilation
from iccld.runtime.settings import Compile
from tests.stages.test_compile import STAGES, WARM_START, train


def main(done: Path) -> None:
    torch.set_num_threads(1)
    compilation.BACKEND = "eager"
    for name in ("segmentation", "adversarial"):
        exact, _ = train(STAGES[name]())
        for how in (Compile.blocks, Compile.whole):
            losses, graphs = train(STAGES[name](), compile=how)
            assert losses == pytest.approx(exact, rel=1e-5), (name, how)
            assert graphs[-1] == graphs[WARM_START] >= 1, (name, how, graphs)  # some are made already
    (done / str(torch.distributed.get_rank())).touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
