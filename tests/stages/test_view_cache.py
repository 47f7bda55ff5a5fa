"""A cache of views changes no bit of a step, wherever its entries are, and training sees what it says it sees."""

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest
import torch
from torch import Tensor

from iccld.models.settings import LatentKind
from iccld.runtime.batches import map_tensors
from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure.flops import on_meta
from iccld.runtime.settings import Compile, EngineConfig
from iccld.stages.adversarial import AdversarialStage
from iccld.stages.settings import ViewCacheConfig
from iccld.stages.view_cache import _MAX_PENDING, IS_HIT, ViewCache
from iccld.stages.views import CORRUPTION_NOISE
from tests.factory import random_batch
from tests.stages.test_adversarial import make_stage
from tests.stages.test_no_waiting import Copies, Literals
from tests.stages.test_objective import SETTINGS

NUM_SAMPLES = 8


class Memory(dict[str, bytes]):
    """A store with room for `most` entries, and for what it has not, the counter `why`."""

    def __init__(self, most: int = 1000, why: str = "full") -> None:
        super().__init__()
        self.most, self.why, self.counters = most, why, {"full": 0, "too_large": 0}

    def put(self, key: str, data: bytes) -> None:
        if len(self) < self.most:
            self[key] = data
        else:
            self.counters[self.why] += 1

    def discard(self, key: str) -> None:
        self.pop(key, None)


def cached_stage(store: Memory, **settings: Any) -> AdversarialStage:
    stage = make_stage(**settings)
    stage.view_cache = ViewCache(NUM_SAMPLES, store, identity="a")
    return stage


def prepared(stage: AdversarialStage, first: int, count: int = 4) -> dict[str, Tensor]:
    """The tensors of samples `first`, ..., as the stream gives them: images repeat, numbers do not."""
    numbers = torch.arange(first, first + count)
    batch = random_batch(num_classes=19, numbers=(numbers % NUM_SAMPLES).tolist())
    for domain in batch.values():
        domain["numbers"] = numbers
    generator = torch.Generator().manual_seed(first)
    batch["source"][CORRUPTION_NOISE] = torch.randn(count, 3, 32, 64, generator=generator)  # as drawn for true numbers
    with torch.no_grad():
        tensors = stage.prepare(batch, 0).tensors
    assert stage.view_cache is not None
    stage.view_cache.finish()
    return tensors


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if name == IS_HIT:
            continue
        assert torch.equal(tensor, other[name]) and tensor.dtype is other[name].dtype, name
        assert tensor.stride() == other[name].stride(), name


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_has_the_same_bits_with_an_empty_a_partly_filled_and_a_full_cache(name: str) -> None:
    store, settings = Memory(), SETTINGS[name]
    one, other = cached_stage(store, **settings), cached_stage(store, **settings)
    cold = [prepared(one, first) for first in (0, 4)]
    assert len(store) == 2
    for first, tensors in zip((0, 4), cold, strict=True):
        assert_equal(prepared(other, first), tensors)
    later = [prepared(one, first) for first in (8, 12)]
    store.discard(next(iter(store)))
    for first, tensors in zip((8, 12), later, strict=True):
        assert_equal(prepared(other, first), tensors)
    other.view_cache = ViewCache(NUM_SAMPLES, Memory(0), identity="a")  # keeps nothing
    for first, tensors in zip((0, 4, 8, 12), cold + later, strict=True):
        assert_equal(prepared(other, first), tensors)


def test_the_frozen_networks_run_once_for_what_is_kept() -> None:
    stage, calls = cached_stage(Memory(), latent=LatentKind.mask), list[int]()
    for part in (stage.model.encoder, stage.model.decoder):
        part.register_forward_hook(lambda *_: calls.append(1))
    assert prepared(stage, 0)[IS_HIT] == 0 and len(calls) == 2
    assert prepared(stage, NUM_SAMPLES)[IS_HIT] == 1 and len(calls) == 2


def test_a_sample_is_seen_again_under_another_timestep_and_noise() -> None:
    stage = cached_stage(Memory(0))  # keeps nothing: the views are computed each time
    once, again, other = (prepared(stage, first) for first in (4, 4 + NUM_SAMPLES, 0))
    assert all(torch.equal(once[name], again[name]) for name in ("z_0", "condition"))
    assert not any(torch.equal(once[name], again[name]) for name in ("t", "noise"))
    assert not any(torch.equal(once[name], other[name]) for name in ("z_0", "condition"))


def test_training_without_a_cache_is_as_it_was() -> None:
    """Views are those of the cache but for the rounding, for the samples before any repeats."""
    with torch.no_grad():
        plain = make_stage().prepare(random_batch(num_classes=19, numbers=range(4)), 0).tensors
    cached = prepared(cached_stage(Memory()), 0)
    assert torch.equal(plain["t"], cached["t"]) and torch.equal(plain["noise"], cached["noise"])
    torch.testing.assert_close(plain["condition"], cached["condition"], rtol=1e-3, atol=1e-4)
    assert not torch.equal(plain["condition"], cached["condition"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
        lambda data: data[:4] + bytes([data[4] ^ 8]) + data[5:],
        lambda data: data[:12] + bytes([data[12] ^ 1]) + data[13:],
    ],
)
def test_an_entry_that_is_not_whole_is_a_miss_and_is_replaced(spoil: Callable[[bytes], bytes]) -> None:
    store = Memory()
    stage = cached_stage(store)
    cold = prepared(stage, 0)
    [(key, data)] = store.items()
    store[key] = spoil(data)
    assert_equal(prepared(stage, 0), cold)
    assert store[key] == data


def test_another_identity_and_another_micro_batch_have_entries_of_their_own() -> None:
    store = Memory()
    stage = cached_stage(store)
    prepared(stage, 0)
    prepared(stage, 0, count=2)
    stage.view_cache = ViewCache(NUM_SAMPLES, store, identity="b")
    prepared(stage, 0)
    assert len(store) == 3


def batch_of(first: int = 0) -> dict[str, Any]:
    return {"source": {"images": torch.zeros(2), "numbers": torch.tensor([first, first + 1])}}


def test_floats_are_kept_as_fp16_and_all_else_as_it_is() -> None:
    made = {
        "float32": torch.randn(2, 3, 5),
        "channels_last": torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
        "bfloat16": torch.randn(2, 7).bfloat16(),
        "uint8": torch.tensor([[0, 255, 3]], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "int64": torch.tensor(1 << 40),
    }
    cache = ViewCache(NUM_SAMPLES, Memory(), identity="a")
    cold = cache(batch_of(), lambda batch: made)
    cache.finish()
    warm = cache(batch_of(), lambda batch: pytest.fail("it is there"))
    assert_equal(cold, warm)
    for name, tensor in made.items():
        assert torch.equal(warm[name], tensor.half().float() if tensor.dtype is torch.float32 else tensor)


@pytest.mark.parametrize("value", [70_000.0, float("nan"), float("-inf")])
def test_what_fp16_does_not_hold_is_refused(value: float) -> None:
    cache = ViewCache(NUM_SAMPLES, Memory(), identity="a")
    cache(batch_of(), lambda batch: {"features": torch.tensor([1.0, value])})
    with pytest.raises(ValueError, match=r"stage2.cache: features has values that are not finite, or that fp16"):
        cache.finish()


def test_a_failure_is_raised_when_it_is_asked_for_and_not_where_only_one_rank_would_meet_it() -> None:
    cache = ViewCache(NUM_SAMPLES, Memory(), identity="a")
    cache(batch_of(0), lambda batch: {"features": torch.tensor([70_000.0])})
    wait([*cache._pending])
    for first in range(0, 12, 2):
        cache(batch_of(first), lambda batch: {"features": torch.ones(1)})
    with pytest.raises(ValueError, match=r"stage2.cache: features has values that are not finite"):
        cache.raise_failures()


@pytest.mark.parametrize(
    ("why", "what"),
    [("full", "is used up: the other"), ("too_large", "has no room for the views of a micro-batch")],
)
def test_why_views_are_not_kept_is_said_once(why: str, what: str) -> None:
    said: list[str] = []
    cache = ViewCache(NUM_SAMPLES, Memory(1, why), identity="a", report=said.append)
    for first in (0, 2, 4):
        cache(batch_of(first), lambda batch: {"z": torch.ones(3)})
    cache.finish()
    assert len(said) == 1 and said[0].startswith(f"stage2.cache.max_gib {what}")


def test_a_slow_disk_is_not_waited_for() -> None:
    store, goes_on = Memory(), threading.Event()
    put = store.put
    store.put = lambda *args: goes_on.wait(60) and put(*args)  # type: ignore[method-assign]
    cache = ViewCache(1000, store, identity="a")
    began = time.monotonic()
    for first in range(0, 40, 2):
        cache(batch_of(first), lambda batch: {"z": torch.ones(3)})
    assert time.monotonic() - began < 30
    goes_on.set()
    cache.finish()
    assert len(store) == _MAX_PENDING


def test_a_copy_of_a_stage_reads_and_keeps_nothing() -> None:
    store = Memory()
    stage = copy.deepcopy(cached_stage(store))
    assert stage.view_cache is None
    with torch.no_grad():
        stage.prepare(random_batch(num_classes=19, numbers=range(4)), 0)
    assert not store


def test_what_is_read_is_sent_ahead_in_one_copy() -> None:
    stage, batch = cached_stage(Memory()), random_batch(num_classes=19, numbers=range(4))
    cache = stage.view_cache
    assert cache is not None
    with torch.no_grad():
        stage.prepare(batch, 0)
    cache.finish()
    on_device, batch = on_meta(stage), map_tensors(batch, lambda tensor: tensor.to("meta"))
    on_device.view_cache = cache
    with torch.no_grad(), Copies() as copies, Literals() as literals:
        tensors = on_device.prepare(batch, 0).tensors
    assert tensors["z_0"].is_meta and not literals.seen
    assert all(goes_on for _, goes_on in copies.seen)
    assert len(copies.seen) == 5, "the entry, the timesteps, and the noise of three domains"


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_the_bits_are_the_same() -> None:
    with Engine(EngineConfig(compile=Compile.none, cudnn_benchmark=False)) as engine:  # equal kernels in each step
        stage = cached_stage(store := Memory(), **SETTINGS["rich"])
        for module in (stage.model, stage.module, stage.teacher.module):
            module.to(engine.device)
        [batch] = engine.prefetch(
            iter([map_tensors(random_batch(num_classes=19, numbers=range(4)), Tensor.pin_memory)])
        )
        found = []
        for step in range(4):
            if step == 2:
                store.clear()
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step fills caches
            try:
                with torch.no_grad(), engine.autocast():
                    found.append(stage.prepare(batch, 0).tensors)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert stage.view_cache is not None
            stage.view_cache.finish()
        assert [int(tensors[IS_HIT]) for tensors in found] == [0, 1, 0, 1]
        for tensors in found[1:]:
            assert_equal(tensors, found[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": -1}, r"num_samples=-1 must be 0 \(off\) or above"),
        ({"num_samples": 8}, "num_samples=8 needs stage2.cache.folder"),
        ({"max_gib": 0.0}, "max_gib=0.0 must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewCacheConfig(**settings)
