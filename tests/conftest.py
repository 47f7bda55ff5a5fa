"""Shared by all tests: one thread, no network, and a tiny embedded data set in shards."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `source`, `target` (no labels), `target_labelled`, `validation`: 64x128 scenes in shards."""
    from tests.factory import make_scene_shards

    folder = tmp_path_factory.mktemp("scenes")
    make_scene_shards(folder)
    return folder


def pytest_collection_finish() -> None:
    """Take the libraries out of what is collected as garbage, which each engine does that is let go."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))
