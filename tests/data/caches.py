"""Small caches for tests, and what is in them."""

from pathlib import Path

import numpy as np
import pytest

from iccld.data.storage.cache import CacheConfig, SampleCache

NUM_BUCKETS = 4
ENTRY_BYTES = 10_000
ENTRY_ON_DISK = 12_288
DAY = 86_400.0


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave so few buckets that a test fills them within a second."""
    monkeypatch.setattr(SampleCache, "num_buckets", NUM_BUCKETS)


def samples(cache: SampleCache) -> Path:
    return Path(cache.config.folder) / "samples"


def open_cache(folder: Path, *, num_entries: float = 1000) -> SampleCache:
    """A cache with room for about as many entries."""
    return SampleCache(CacheConfig(str(folder), (num_entries * ENTRY_ON_DISK + NUM_BUCKETS * 4096) / 2**30))


def entry(key: str) -> bytes:
    return np.random.default_rng(list(key.encode())).bytes(ENTRY_BYTES)


def disk_use(cache: SampleCache) -> int:
    files = [path for path in samples(cache).rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def budget(cache: SampleCache) -> int:
    return int(cache.config.max_gib * 2**30)


def entries(cache: SampleCache) -> list[Path]:
    return sorted(path for path in samples(cache).rglob("*") if len(path.name) == 32)
