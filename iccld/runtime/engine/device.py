"""The device of a rank: which one it is, that no other rank has it, and how its kernels are chosen."""

import os
from collections.abc import Sequence
from typing import Any

import torch

SHARED_GPU = "ICCLD_SHARED_GPU"
"""Variable that, if `true`, lets ranks share a GPU and exchange over gloo; slow, for tests with one GPU."""


def may_share() -> bool:
    """Tell whether the environment allows several ranks on one GPU."""
    return os.environ.get(SHARED_GPU) == "true"


def with_index(device: torch.device) -> torch.device:
    """Return the same device by its number: CUDA's own functions refuse a device without one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def device_name(device: torch.device) -> str:
    """Return the model of a GPU; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def identity(device: torch.device) -> str:
    """Return a name that no other GPU of the node has, however a scheduler numbers them; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def check_own(places: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError if two ranks have one GPU. `places` holds the host and `identity` of every rank."""
    on_gpus = [place for place in places if place[1]]
    for host in dict.fromkeys(host for host, _ in on_gpus):
        of_host = [gpu for other, gpu in on_gpus if other == host]
        if (num_gpus := len(set(of_host))) < len(of_host) and not may_share():
            raise ValueError(
                f"{host} has {len(of_host)} ranks and {num_gpus} GPUs for them; a rank needs a GPU of its own: start "
                f"{num_gpus} ranks there, or set CUDA_VISIBLE_DEVICES= (empty) to train on its CPU."
            )


def choose_kernels(*, deterministic: bool, matmul_precision: str, cudnn_benchmark: bool) -> None:
    """Tell torch's libraries how to choose their kernels. Call before the first one runs on the device.

    `deterministic`: the same bits in each run; what has no such kernel raises RuntimeError if it is called. On a
    CPU the results do not change.
    """
    torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cudnn.benchmark = cudnn_benchmark and not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor once more
