"""Shared by all tests: one thread, no network, and a tiny embedded data set in shards."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests.browser import browser as browser  # a fixture for all

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # on a busy machine any example may take long
settings.load_profile("untimed")

VARIABLES = ("ICCLD", "HYDRA", "ACCELERATE", "OMP", "CUBLAS", "RANK", "LOCAL_", "WORLD_", "MASTER_", "SLURM", "HF_")
"""Beginnings of the variables that matter; libraries set others at their first use, for good."""
SET_ONCE = {"ACCELERATE_BYPASS_DEVICE_MAP"}  # by the first engine of a process
HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def _of_the_process() -> dict[str, object]:
    """Return all that later tests of this process would inherit from one that forgets to put it back."""
    mask = os.umask(0o022)
    os.umask(mask)
    loggers = [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    kept = {key: value for key, value in os.environ.items() if key.startswith(VARIABLES) and key not in SET_ONCE}
    variables = {f"environment {key}": value for key, value in kept.items()}
    return {
        **variables,
        "folder": Path.cwd(),
        "command line": list(sys.argv),
        "umask": mask,
        "signal handlers": [signal.getsignal(number) for number in HEARD],
        "silent loggers": sorted(one.name for one in loggers if one.disabled and one.name.startswith("iccld")),
        "root logger": (logging.root.level, logging.root.manager.disable),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
    }


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    before = _of_the_process()
    yield
    after = _of_the_process()
    changed = {
        key: (before.get(key), after.get(key)) for key in {**before, **after} if before.get(key) != after.get(key)
    }
    assert not changed, f"the test changed its process, before and after: {changed}"


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `source`, `target` (no labels), `target_labelled`, `validation`: 64x128 scenes in shards."""
    from tests.factory import make_scene_shards

    folder = tmp_path_factory.mktemp("scenes")
    make_scene_shards(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _without_flops() -> Iterator[Callable[..., Any] | None]:
    """Let trainings in this process count no FLOPs, which takes as long as ten steps; yield what would count them."""
    try:
        from iccld.programs.train import train
    except ImportError:  # a bare GPU machine need not have all that a training takes
        yield None
        return
    counting = train._flops
    with patch.object(train, "_flops", lambda *_: lambda step: 0.0):
        yield counting


@pytest.fixture
def with_flops(_without_flops: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test's trainings count their FLOPs, as those of users do."""
    monkeypatch.setattr("iccld.programs.train.train._flops", _without_flops)


def pytest_collection_finish() -> None:
    """Freeze the objects of the libraries: `Engine.detach` collects garbage, and would walk over all of them."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))
