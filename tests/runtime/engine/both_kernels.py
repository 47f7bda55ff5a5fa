"""Prints the losses of both stages with the usual kernels and with deterministic ones, and whether torch has these."""

import torch

from iccld.runtime.settings import EngineConfig
from tests.stages.test_compile import STAGES, train

for deterministic in (False, True):
    config = EngineConfig(deterministic=deterministic)
    print([train(STAGES[name](), config=config)[0] for name in ("segmentation", "adversarial")])
    print(torch.are_deterministic_algorithms_enabled())
