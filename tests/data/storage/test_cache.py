import logging
import multiprocessing
import os
import pickle
import random
import resource
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iccld.data.storage.cache import CacheConfig, SampleCache
from tests.data.caches import (
    DAY,
    ENTRY_BYTES,
    NUM_BUCKETS,
    budget,
    disk_use,
    entries,
    entry,
    few_buckets,
    open_cache,
    samples,
)

__all__ = ["few_buckets"]


def test_what_was_put_is_what_one_gets(tmp_path: Path):
    cache = open_cache(tmp_path)
    keys = ["a", "", "../../etc/passwd", "a/b\0c", "ü" * 1000]
    assert [cache.get(key) for key in keys] == [None] * len(keys)
    for size, key in enumerate(keys):
        cache.put(key, entry(key)[: size * 2500])
    again = pickle.loads(pickle.dumps(cache))
    for size, key in enumerate(keys):
        assert cache.get(key) == again.get(key) == entry(key)[: size * 2500]
    assert cache.counters == {
        "hits": 5, "misses": 5, "puts": 5, "evictions": 0, "full": 0, "too_large": 0, "busy": 0, "failures": 0
    }  # fmt: skip
    assert {len(path.name) for path in entries(cache)} == {32} and len(entries(cache)) == 5


def test_what_is_discarded_is_gone_and_makes_room(tmp_path: Path):
    cache = open_cache(tmp_path, num_entries=NUM_BUCKETS)
    keys = [str(number) for number in range(40)]
    for key in keys:
        cache.put(key, entry(key))
    kept = [key for key in keys if cache.get(key)]
    assert len(kept) == NUM_BUCKETS and cache.counters["full"] == 36
    for key in kept:
        cache.discard(key)
        cache.discard(key)
        assert cache.get(key) is None
    for key in kept:
        cache.put(key, entry(key))
        assert cache.get(key) == entry(key)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:5], lambda data: data + b"x"]
)
def test_an_entry_that_is_not_whole_is_not_given(tmp_path: Path, damage):
    cache = open_cache(tmp_path)
    cache.put("a", entry("a"))
    [path] = entries(cache)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("a") is None and not entries(cache)
    cache.put("a", entry("a"))
    assert cache.get("a") == entry("a")


def test_a_full_bucket_keeps_what_it_has(tmp_path: Path):
    cache = open_cache(tmp_path, num_entries=40)
    for number in range(400):
        cache.put(str(number), entry(str(number)))
    first = {str(number) for number in range(400) if cache.get(str(number))}
    assert 35 <= len(first) <= 40 and cache.counters["evictions"] == 0
    assert cache.counters["full"] == 400 - len(first)
    assert max(int(key) for key in first) < 120, "first come, first kept"
    assert disk_use(cache) <= budget(cache)


def test_what_nobody_has_read_for_a_day_makes_room(tmp_path: Path):
    cache = open_cache(tmp_path, num_entries=40)
    old = [str(number) for number in range(200)]
    for key in old:
        cache.put(key, entry(key))
    kept = [key for key in old if cache.get(key)]
    for path in entries(cache):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    read = kept[: len(kept) // 2]
    assert all(cache.get(key) for key in read), "reading makes them young"
    for path in samples(cache).glob("*/lock"):
        os.truncate(path, 0)  # as if the buckets had been counted a day ago
    for number in range(1000, 1200):
        cache.put(str(number), entry(str(number)))
    assert all(cache.get(key) for key in read)
    assert 0 < cache.counters["evictions"] <= len(kept) - len(read)
    assert sum(cache.get(str(number)) is not None for number in range(1000, 1200)) >= cache.counters["evictions"] - 1
    assert disk_use(cache) <= budget(cache)


@pytest.mark.parametrize("name", ["holiday0.jpg", "incoming", "deadbeef" * 4 + ".jpg", "deadbeef" * 4])
def test_what_the_cache_did_not_write_stays_and_is_not_counted(tmp_path: Path, name: str):
    cache = open_cache(tmp_path, num_entries=NUM_BUCKETS)
    for bucket in range(NUM_BUCKETS):
        folder = samples(cache) / f"{bucket:02x}"
        folder.mkdir(parents=True)
        if name in ("incoming", "deadbeef" * 4):  # names of ours
            (folder / name).symlink_to(tmp_path / "far")
        else:
            (folder / name).write_bytes(bytes(10 * ENTRY_BYTES))
        (folder / ("ab" * 16)).symlink_to(tmp_path / "far")
        for path in folder.iterdir():
            os.utime(path, (time.time() - 2 * DAY,) * 2, follow_symlinks=False)
    for key in map(str, range(20)):
        cache.put(key, entry(key))
    assert cache.counters["evictions"] == 0 and cache.counters["puts"] == (0 if name == "incoming" else NUM_BUCKETS)
    left = [path.name for path in samples(cache).rglob("*") if path.name in (name, "ab" * 16)]
    assert len(left) == 2 * NUM_BUCKETS


def test_a_full_bucket_is_not_searched_at_every_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache, searches = open_cache(tmp_path, num_entries=40), []
    make_room = SampleCache._make_room
    monkeypatch.setattr(SampleCache, "_make_room", lambda *args: searches.append(1) or make_room(*args))
    for number in range(400):
        cache.put(str(number), entry(str(number)))
    assert len(searches) == NUM_BUCKETS, "once each, to count what is there"


def test_a_hit_rarely_writes(tmp_path: Path):
    cache = open_cache(tmp_path)
    cache.put("a", b"1")
    [path] = entries(cache)
    for age, touched in ((3_000, False), (4_000, True), (-100, True)):
        before = time.time() - age
        os.utime(path, (before, before))
        cache.get("a")
        assert (abs(path.stat().st_mtime - before) > 1) == touched


@pytest.mark.parametrize("counted", [True, False])
def test_what_a_killed_process_was_writing_is_replaced(tmp_path: Path, counted: bool):
    cache = open_cache(tmp_path, num_entries=4 * NUM_BUCKETS)
    cache.put("a", entry("a"))
    bucket = entries(cache)[0].parent
    (bucket / "incoming").write_bytes(bytes(ENTRY_BYTES))
    if not counted:
        os.truncate(bucket / "lock", 0)
    for number in range(60):
        cache.put(str(number), entry(str(number)))
    assert not (bucket / "incoming").exists() and disk_use(cache) <= budget(cache)
    assert len(entries(cache)) == 4 * NUM_BUCKETS and not cache.counters["failures"]


def test_putting_again_takes_no_room(tmp_path: Path):
    cache = open_cache(tmp_path, num_entries=4 * NUM_BUCKETS)
    for _ in range(40):
        cache.put("a", entry("a"))
    for number in range(60):
        cache.put(str(number), entry(str(number)))
    assert len(entries(cache)) == 4 * NUM_BUCKETS


def test_a_bucket_in_use_is_not_waited_for(tmp_path: Path):
    cache = open_cache(tmp_path)
    with cache._locked(cache._path("a").parent):
        start = time.monotonic()
        cache.put("a", b"1")
        assert time.monotonic() - start < 1 and cache.counters["busy"] == 1
    cache.put("a", b"1")
    assert cache.get("a") == b"1"


def put_on_a_full_disk(cache: SampleCache, told: Any) -> None:
    """Put with a limit that lets a file begin, and not end, as a full disk does."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("iccld.data.storage.cache").addHandler(handler)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    for number in range(10):
        cache.put(str(number), entry(str(number)))
    told.put((messages, dict(cache.counters), cache.get("a") == entry("a"), cache.get("0")))


def test_on_a_full_disk_the_cache_goes_on_without_writing(tmp_path: Path):
    cache, context = open_cache(tmp_path), multiprocessing.get_context("fork")
    cache.put("a", entry("a"))
    told = context.SimpleQueue()
    process = context.Process(target=put_on_a_full_disk, args=(cache, told))
    process.start()
    messages, counters, kept, missing = told.get()
    process.join()
    assert messages == [f"data.cache.folder={tmp_path}: File too large; samples come from the storage."]
    assert counters["failures"] == 1 and kept and missing is None
    assert not list(samples(cache).rglob("incoming"))


def test_a_folder_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"file cannot be written to or locked \(.*\); use a folder of this node's disk"
    ):
        open_cache(tmp_path / "file")


@pytest.mark.parametrize("size", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cache_of_no_size_is_refused(size: float):
    with pytest.raises(
        ValueError,
        match=rf"data.cache.max_gib={size} must be positive; an empty data.cache.folder turns the cache off.",
    ):
        CacheConfig("x", size)


def test_keeping_beats_replacing_in_permuted_epochs(tmp_path: Path):
    """A cache of half a set hits half of the time if it keeps, 15 % if it replaces the least recently used."""
    cache, num_samples, num_epochs = open_cache(tmp_path, num_entries=100), 200, 5
    draw, recent, hits = random.Random(0), OrderedDict[str, None](), 0
    for epoch in range(num_epochs):
        if epoch == 1:
            cache.counters["hits"], hits = 0, 0
        for number in draw.sample(range(num_samples), num_samples):
            key = str(number)
            if cache.get(key) is None:
                cache.put(key, entry(key))
            hits += key in recent
            recent[key] = None
            recent.move_to_end(key)
            if len(recent) > 100:
                recent.popitem(last=False)
    reads = (num_epochs - 1) * num_samples
    assert 0.45 <= cache.counters["hits"] / reads <= 0.5
    assert abs(hits / reads - (0.5 + 0.5 * np.log(0.5))) < 0.05
