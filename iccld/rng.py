"""Keyed randomness: every draw is a function of its purpose and of the sample's number alone.

No generator is remembered between two draws, so a run that stops and goes on, or that is split over another number of
ranks or loader workers, draws the same numbers for the same samples.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def key(seed: int, purpose: str, *numbers: int) -> int:
    """Return the 63-bit key of one draw: BLAKE2b of the seed, the purpose and further numbers (sample, epoch, ...).

    NumPy uses all of it, torch's generator on the CPU 32 bits: of a million draws, about 100 pairs are alike.
    """
    text = f"{seed}/{purpose}/" + "/".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Make a NumPy generator for the draws of one sample."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *numbers)))


def torch_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Make a CPU generator: draws made on the CPU are equal on every kind of device."""
    return torch.Generator().manual_seed(key(seed, purpose, *numbers))


def normal(shape: tuple[int, ...], *, seed: int, purpose: str, numbers: Tensor, device: torch.device | str) -> Tensor:
    """Draw standard normal noise, keyed by sample: `(len(numbers), *shape)` float32 on `device`."""
    draws = [torch.randn(shape, generator=torch_generator(seed, purpose, int(n))) for n in numbers.tolist()]
    return to_device(torch.stack(draws), device)


def uniform(count: int, *, seed: int, purpose: str, numbers: Tensor) -> Tensor:
    """Draw `count` uniform values in [0, 1) a sample: `(len(numbers), count)` float64 on the CPU."""
    generators = (torch_generator(seed, purpose, int(n)) for n in numbers.tolist())
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators])


def to_device(draws: Tensor, device: torch.device | str) -> Tensor:
    """Copy host memory to `device`. The host does not wait: CUDA copies from pinned memory in the background."""
    if torch.device(device).type == "cuda" and not draws.is_cuda:
        draws = draws.pin_memory()
    return draws.to(device, non_blocking=True)
