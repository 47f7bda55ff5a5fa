"""A rank's device: its number, that it is the rank's own, and kernels that give the same bits."""

import os
from pathlib import Path

import pytest
import torch

from iccld.runtime.engine import engine as engine_module
from iccld.runtime.engine.device import SHARED_GPU, check_own, choose_kernels, with_index
from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import EngineConfig
from tests.forked import Forked


def test_a_gpu_without_a_number_gets_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index(torch.device("cuda")) == torch.device("cuda", 3)
    assert with_index(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert with_index(torch.device("cpu")) == torch.device("cpu")


def test_ranks_on_gpus_of_their_own_pass() -> None:
    check_own([("n1", "a"), ("n1", "b"), ("n2", "a")])
    check_own([("n1", ""), ("n1", "")])


def test_two_ranks_on_one_gpu_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [("n1", "a"), ("n2", "b"), ("n2", "c"), ("n2", "b")]
    with pytest.raises(ValueError, match=r"n2 has 3 ranks and 2 GPUs .* start 2 ranks there, or set CUDA_VISIBLE_DEV"):
        check_own(places)
    monkeypatch.setenv(SHARED_GPU, "true")
    check_own(places)


def test_an_engine_numbers_its_device_and_asks_that_it_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[tuple[str, str]]] = []
    monkeypatch.setattr(engine_module, "with_index", lambda device: torch.device(device.type, 0))
    monkeypatch.setattr(engine_module, "identity", lambda device: f"identity of {device}")
    monkeypatch.setattr(engine_module, "check_own", asked.append)
    with Engine(EngineConfig()) as engine:
        assert engine.device == torch.device("cpu", 0)
    assert [[gpu for _, gpu in places] for places in asked] == [["identity of cpu:0"]]


def test_kernels_are_chosen_by_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        choose_kernels(deterministic=False, matmul_precision="high", cudnn_benchmark=True)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        choose_kernels(deterministic=True, matmul_precision="highest", cudnn_benchmark=True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        choose_kernels(deterministic=False, matmul_precision="highest", cudnn_benchmark=True)


def test_deterministic_kernels_change_nothing_on_a_cpu(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = Forked("tests.runtime.engine.both_kernels", [], environment=dict(os.environ), log=log)
    assert process.wait(300) == 0, log.read_text()
    usual, was_usual, deterministic, was_deterministic = log.read_text().splitlines()
    assert deterministic == usual
    assert (was_usual, was_deterministic) == ("False", "True")
