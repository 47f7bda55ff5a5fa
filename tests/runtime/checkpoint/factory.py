"""Stores of checkpoints in a folder, and damage to their files."""

from pathlib import Path

import torch

from iccld.runtime.checkpoint.pieces import whole
from iccld.runtime.checkpoint.store import CheckpointStore
from iccld.runtime.ranks import Ranks
from iccld.runtime.settings import CheckpointConfig

ABOUT = {"stage": "stage1", "layout": {"engine": "ddp", "world_size": 1}}


def store(folder: Path, reports: list[str] | None = None, *, asynchronous: bool = False) -> CheckpointStore:
    reports = reports if reports is not None else []
    return CheckpointStore(folder, CheckpointConfig(asynchronous=asynchronous), Ranks(), report=reports.append)


def save(checkpoints: CheckpointStore, step: int) -> Path:
    runs = {"module/weight": whole(torch.full((8, 8), float(step))), "exp_avg/weight": whole(torch.ones(8, 8))}
    checkpoints.save(step, runs, ABOUT)
    return checkpoints.folder / f"step_{step:08d}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
