"""Keyed randomness: every draw is a function of what it is for and of the sample's number, and of nothing else.

No generator is remembered between two draws, so a run that stops and goes on, or that is split over another number of
ranks or loader workers, draws the same numbers for the same samples.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def key(seed: int, purpose: str, *numbers: int) -> int:
    """The 63-bit key of one draw: BLAKE2b of the seed, the purpose and any further numbers (sample, epoch, ...)."""
    text = f"{seed}/{purpose}/" + "/".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A NumPy generator for the draws of one sample."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *numbers)))


def torch_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator: draws made on the CPU are equal on every kind of device."""
    return torch.Generator().manual_seed(key(seed, purpose, *numbers))


def normal(shape: tuple[int, ...], *, seed: int, purpose: str, numbers: Tensor, device: torch.device | str) -> Tensor:
    """Standard normal noise, one keyed draw a sample: `(len(numbers), *shape)` float32 on `device`."""
    draws = [torch.randn(shape, generator=torch_generator(seed, purpose, int(n))) for n in numbers.tolist()]
    return to_device(torch.stack(draws), device)


def uniform(count: int, *, seed: int, purpose: str, numbers: Tensor) -> Tensor:
    """`count` uniform draws in [0, 1) a sample: `(len(numbers), count)` float64 on the CPU."""
    generators = (torch_generator(seed, purpose, int(n)) for n in numbers.tolist())
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators])


def to_device(draws: Tensor, device: torch.device | str) -> Tensor:
    """Host memory to `device`; the host does not wait: CUDA copies from pinned memory, in its own time."""
    if torch.device(device).type == "cuda" and not draws.is_cuda:
        draws = draws.pin_memory()
    return draws.to(device, non_blocking=True)
