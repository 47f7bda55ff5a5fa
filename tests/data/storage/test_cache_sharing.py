import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from iccld.data.storage.cache import SampleCache
from tests.data.caches import budget, disk_use, entry, few_buckets, open_cache, samples

__all__ = ["few_buckets"]


def hammer(cache: SampleCache, seed: int, limit_s: float = 60.0) -> None:
    """Gets and puts random keys, and holds whatever it gets to be right."""
    draw, end = random.Random(seed), time.monotonic() + limit_s
    for _ in range(300):
        key = str(draw.randrange(150))
        data = cache.get(key)
        assert data in (None, entry(key))
        if data is None:
            cache.put(key, entry(key))
        elif draw.random() < 0.05:
            cache.discard(key)
        if time.monotonic() > end:
            return
    assert cache.counters["hits"] > 0 and not cache.counters["failures"]


def test_eight_processes_share_a_cache_within_its_bounds(tmp_path: Path):
    cache, most = open_cache(tmp_path, num_entries=60), 0
    processes = [multiprocessing.get_context("fork").Process(target=hammer, args=(cache, seed)) for seed in range(8)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        try:
            most = max(most, disk_use(cache))
        except FileNotFoundError:
            continue
    assert [process.exitcode for process in processes] == [0] * 8
    assert budget(cache) * 0.7 < max(most, disk_use(cache)) <= budget(cache)


def test_threads_share_a_cache(tmp_path: Path):
    cache = open_cache(tmp_path, num_entries=60)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: hammer(cache, seed), range(4)))
    assert cache.counters["hits"] + cache.counters["misses"] == 4 * 300
    assert disk_use(cache) <= budget(cache)


def put_for_ever(cache: SampleCache) -> None:
    for number in range(10**9):
        key = str(number % 1000)
        cache.put(key, entry(key))
        cache.discard(key)


def test_killed_processes_leave_nothing_wrong(tmp_path: Path):
    cache, draw = open_cache(tmp_path, num_entries=40), random.Random(0)
    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(target=put_for_ever, args=(cache,))
        process.start()
        time.sleep(0.05 + 0.02 * draw.random())
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert disk_use(cache) <= budget(cache)
    assert all(cache.get(str(number)) in (None, entry(str(number))) for number in range(1000))
    for number in range(400):
        cache.put(str(number), entry(str(number)))
    assert not list(samples(cache).rglob("incoming")), "what was half written has been replaced"
    assert cache.counters["busy"] == 0, "the dead hold no lock"
