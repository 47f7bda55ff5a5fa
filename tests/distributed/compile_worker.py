"""One rank: both stages, compiled, train as they do eagerly, and no graph is made after warm-up."""

import sys
from pathlib import Path

import pytest
import torch

from iccld.runtime import compilation
from tests.stages.test_compile import STAGES, WARM_START, train


def main(done: Path) -> None:
    torch.set_num_threads(1)
    compilation.BACKEND = "eager"
    for name in ("segmentation", "adversarial"):
        exact, _ = train(STAGES[name](), compiled=False)
        losses, graphs = train(STAGES[name](), compiled=True)
        assert losses == pytest.approx(exact, rel=1e-5), name
        assert graphs[-1] == graphs[WARM_START] >= 2, (name, graphs)  # stage 2 has some of stage 1's already
    (done / str(torch.distributed.get_rank())).touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
