"""Which engine trains: what accelerate's launcher read in its YAML and left in the environment."""

import contextlib
import os
from collections.abc import Iterator
from enum import Enum

import torch


class EngineKind(Enum):
    """Who holds what: everything on every rank, or moments, gradients and weights in shards."""

    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    fsdp2 = "fsdp2"


def kind_of_launch() -> EngineKind:
    """What accelerate's launcher read in its YAML. Raises ValueError for what is not one of accelerate_configs/."""
    environment = os.environ
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        if (version := environment.get("FSDP_VERSION")) != "2":
            raise ValueError(f"fsdp_version={version} is not supported; launch with accelerate_configs/fsdp2.yaml.")
        return EngineKind.fsdp2
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if stage not in ("1", "2"):
            raise ValueError(
                f"zero_stage={stage} is not supported: parts of a module that are used beside its forward pass would "
                f"be empty; launch with accelerate_configs/fsdp2.yaml, which also shards weights, or zero2.yaml."
            )
        return EngineKind[f"zero{stage}"]
    return EngineKind.ddp


@contextlib.contextmanager
def without_plugins() -> Iterator[None]:
    """Accelerate forms ranks and precision; its own FSDP and DeepSpeed wrappers would lose gradients on a CPU."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def join_alone(device: torch.device) -> None:
    """A process group of one rank, for backends that need one."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
