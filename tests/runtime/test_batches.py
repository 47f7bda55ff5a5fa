"""Prefetching changes neither the order nor the content of batches, nor the step on which their stream fails."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from iccld.runtime.batches import map_tensors, one_ahead, prefetch


def batch_of(number: int) -> dict[str, Any]:
    """Images channels last in pinned memory where there is a device, as the loader hands them over."""
    images = torch.full((2, 64 + number % 3, 48, 3), number % 256, dtype=torch.uint8)
    if torch.cuda.is_available():
        images = images.pin_memory()
    return {"source": {"images": images.permute(0, 3, 1, 2), "keys": [f"a{number}"]}, "number": number}


def stream(length: int, taken: list[int]) -> Iterator[dict[str, Any]]:
    for number in range(length):
        taken.append(number)
        yield batch_of(number)
    raise ValueError(f"batch {length} cannot be read")


def test_without_a_device_batches_pass_as_they_are() -> None:
    batches = [batch_of(number) for number in range(3)]
    for given, got in zip(batches, prefetch(iter(batches), torch.device("cpu")), strict=True):
        assert got is given


def test_without_a_device_nothing_is_taken_ahead() -> None:
    taken: list[int] = []
    batches = prefetch(stream(3, taken), torch.device("cpu"))
    for number in range(3):
        assert next(batches)["number"] == number
        assert taken == list(range(number + 1))
    with pytest.raises(ValueError, match="batch 3 cannot be read"):
        next(batches)


@pytest.mark.parametrize("length", range(5))
def test_one_is_taken_ahead(length: int) -> None:
    taken: list[int] = []
    items = one_ahead(stream(length, taken))
    for number in range(length):
        assert next(items)["number"] == number
        assert taken == list(range(min(number + 2, length)))
    with pytest.raises(ValueError, match=f"batch {length} cannot be read"):
        next(items)


def test_the_end_comes_after_the_last() -> None:
    assert list(one_ahead(iter(range(5)))) == list(range(5))
    assert list(one_ahead(iter([]))) == []


def test_an_interrupt_is_not_kept_back() -> None:
    def interrupted() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(one_ahead(interrupted()))


def test_only_tensors_are_mapped() -> None:
    batch = batch_of(3)
    doubled = map_tensors(batch, lambda tensor: tensor * 2)
    assert doubled["source"]["images"].unique().tolist() == [6]
    assert doubled["source"]["keys"] == ["a3"] and doubled["number"] == 3
    assert batch["source"]["images"].unique().tolist() == [3]


@pytest.mark.gpu
def test_on_a_gpu_batches_arrive_whole_behind_a_busy_device() -> None:
    device, length = torch.device("cuda", torch.cuda.current_device()), 40
    load = torch.randn(2048, 2048, device=device)
    sums, taken = [], []
    batches = prefetch(stream(length, taken), device)
    for _ in range(length):
        batch = next(batches)
        images = batch["source"]["images"]
        assert images.device == device and images.is_contiguous(memory_format=torch.channels_last)
        for _ in range(5):  # so that the step is still computing when the next batches are copied
            load = load @ load / 2048
        sums.append(images.double().mean() + 0 * load.mean().nan_to_num())
        del batch, images  # the memory of a batch that is still being read may be asked for again
    assert [float(value) for value in sums] == [number % 256 for number in range(length)]
    with pytest.raises(ValueError, match=f"batch {length} cannot be read"):
        next(batches)


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_for_no_copy() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batches = iter([batch_of(number) for number in range(20)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(1 for _ in prefetch(batches, device)) == 20
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_numbers_of_samples_stay_on_the_host() -> None:
    batch = {"source": {"images": torch.zeros(2), "numbers": torch.arange(2), "keys": ["a", "b"]}}
    moved = map_tensors(batch, lambda tensor: tensor.to("meta"))["source"]
    assert moved["images"].is_meta and moved["numbers"].tolist() == [0, 1] and moved["keys"] == ["a", "b"]
