"""Called on two ranks under ZeRO; asserts that a step clips as torch does, and reads nothing from the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import EngineConfig
from tests.factory import layout_for

CLIP = 0.01


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("the host would wait for the device here")


@contextmanager
def nothing_read() -> Iterator[None]:
    """Fail if the host reads a tensor's numbers."""
    names = ("__bool__", "__float__", "__int__", "item", "tolist", "numpy")
    kept = {name: getattr(torch.Tensor, name) for name in names}
    accelerator = get_accelerator()
    try:
        for name in names:
            setattr(torch.Tensor, name, refuse)
        accelerator.synchronize = refuse
        yield
    finally:
        del accelerator.synchronize
        for name in names:
            setattr(torch.Tensor, name, kept[name])


def main(done: str) -> None:
    inputs = torch.randn(6, 2, 8, 5, generator=torch.Generator().manual_seed(1))  # step, rank, sample, channel
    reference = network()
    optimiser = torch.optim.AdamW(reference.parameters(), lr=0.1)
    with Engine(EngineConfig()) as engine:
        module = network()
        groups = [{"params": list(module.parameters()), "lr": 0.1}]
        engine.attach(module, groups, layout=layout_for(engine, 1), gradient_clip=CLIP)
        for step, of_ranks in enumerate(inputs):
            with engine.micro_batch(is_last=True):
                engine.backward(engine.module(of_ranks[engine.ranks.rank]).square().mean())
            if step < 2:  # in its first steps, the optimiser makes its state
                engine.step()
            else:
                with nothing_read():
                    engine.step()
            reference(of_ranks.flatten(0, 1)).square().mean().backward()
            assert nn.utils.clip_grad_norm_(reference.parameters(), CLIP) > CLIP
            optimiser.step()
            optimiser.zero_grad()
        for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        Path(done, f"clipping_{engine.ranks.rank}").touch()
