import gc
import multiprocessing
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from iccld.data.storage.base import (
    MAX_OPEN_SHARDS,
    MissingShard,
    ShortRead,
    Storage,
    StorageConfig,
    StorageError,
    is_remote,
    local_folder,
)
from iccld.data.storage.open import open_storage
from tests import services
from tests.data.conftest import Site

SHARDS = {"a.tar": 300_000, "b c #1%20?x=y é.tar": 70_000, "empty.tar": 0, "one.tar": 1}
KINDS = ["local", "http", "s3", "memory"]


def content(name: str) -> bytes:
    return np.random.default_rng(len(name)).bytes(SHARDS[name])


@pytest.fixture(scope="module")
def open_kind(nginx: Site, s3: str) -> Callable[[str], Storage]:
    """Opens the same shards in a folder, behind nginx, in S3, or in a file system that is not asynchronous."""
    folder = nginx.folder / "set"
    (folder / "index").mkdir(parents=True)
    for name in SHARDS:
        (folder / name).write_bytes(content(name))
        fsspec.filesystem("memory").pipe(f"/set/{name}", content(name))
    (folder / "index" / "index.json").write_bytes(b"{}")
    fsspec.filesystem("memory").pipe("/set/index/index.json", b"{}")
    options = services.upload(folder, s3, "the-set")
    places = {"local": folder, "http": f"{nginx.url}/set/", "s3": "s3://the-set", "memory": "memory://set"}
    return lambda kind: open_storage(
        places[kind], StorageConfig(retry_for_s=5.0, options=options, allow_schemes=["memory"])
    )


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, open_kind: Callable[[str], Storage]) -> Storage:
    return open_kind(request.param)


def reads(seed: int, count: int) -> list[tuple[str, int, int]]:
    """Random ranges within the shards, empty and whole ones among them."""
    draw = random.Random(seed)
    places = [(name, *sorted((draw.randint(0, size), draw.randint(0, size)))) for name, size in SHARDS.items()] * count
    return [(name, first, last - first) for name, first, last in places] + [(name, 0, n) for name, n in SHARDS.items()]


def check(storage: Storage, seed: int, count: int = 3) -> None:
    for name, offset, size in reads(seed, count):
        assert storage.read(name, offset, size) == content(name)[offset : offset + size], (name, offset, size)


def test_every_storage_gives_the_same_bytes(storage: Storage):
    check(storage, seed=1)
    for name, size in SHARDS.items():
        assert storage.size(name) == size
        assert storage.read_all(name, limit=1 << 20) == content(name)
    assert storage.below("index").read_all("index.json", limit=1 << 20) == b"{}"
    assert storage.counters["retries"] == 0 and storage.counters["requests"] > len(SHARDS)


def test_a_long_read_is_made_of_bounded_requests(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(storage), "piece_bytes", 1000)
    assert storage.read("a.tar", 7, 10_001) == content("a.tar")[7:10_008]
    assert storage.counters == {"requests": 11, "retries": 0, "bytes": 10_001}


def test_a_shard_that_is_missing_or_too_short_is_named_without_retries(storage: Storage):
    with pytest.raises(MissingShard, match=r"set/none\.tar does not exist"):
        storage.read("none.tar", 0, 1)
    with pytest.raises(FileNotFoundError):
        storage.size("none.tar")
    for name, offset, size in [("a.tar", 299_999, 2), ("a.tar", 300_000, 1), ("a.tar", 2**40, 10), ("empty.tar", 0, 1)]:
        with pytest.raises(ShortRead, match=rf"set/{name}.*{offset + size - 1} are wanted, but it has {SHARDS[name]};"):
            storage.read(name, offset, size)
    assert storage.counters["retries"] == 0


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a.tar", "/etc/passwd", "index/index.json", "a\\b", "a\nb", "a\x00", "a\u202eb", "é" * 128],
)
def test_names_that_lead_elsewhere_are_refused(storage: Storage, name: str):
    for ask in (lambda: storage.read(name, 0, 1), lambda: storage.size(name), lambda: storage.below(name)):
        with pytest.raises(StorageError, match=r"is no plain file name.*make the index again") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert storage.counters["requests"] == 0


@pytest.mark.parametrize(("offset", "size"), [(2**63, 1), (2**64 - 1, 5), (-1, 5), (0, -1)])
def test_places_outside_any_file_are_refused(storage: Storage, offset: int, size: int):
    with pytest.raises(ShortRead, match="cannot be in any file"):
        storage.read("a.tar", offset, size)


def test_a_storage_may_be_pickled_and_keeps_no_connection(storage: Storage):
    check(storage, seed=2, count=1)
    check(pickle.loads(pickle.dumps(storage)), seed=3, count=1)


def in_child(storage: Any, seed: int) -> None:
    check(storage, seed)
    assert storage.counters["retries"] == 0
    if not storage.is_local:  # nothing of the parent's may be closed by what is collected here
        storage._filesystems.clear()
    gc.collect()


def test_forked_workers_read_while_the_parent_goes_on(storage: Storage):
    check(storage, seed=4, count=1)
    context = multiprocessing.get_context("fork")
    for seed in (5, 6):  # a child that ends must take none of the parent's connections with it
        child = context.Process(target=in_child, args=(storage, seed))
        child.start()
        check(storage, seed + 10)
        child.join(60)
        assert child.exitcode == 0
        check(storage, seed + 20)
    assert storage.counters["retries"] == 0


def test_threads_share_a_storage(storage: Storage):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: check(storage, seed, count=2), range(8)))
    expected = sum(size for seed in range(8) for _, _, size in reads(seed, 2))
    assert storage.counters["bytes"] == expected and storage.counters["retries"] == 0


def test_few_files_are_open_though_threads_read_many(tmp_path: Path):
    for number in range(100):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 100)
    storage, most, ended = open_storage(tmp_path), 0, threading.Event()

    def read(seed: int) -> None:
        for number in random.Random(seed).choices(range(100), k=400):
            assert storage.read(f"{number}.tar", 50, 20) == bytes([number]) * 20

    def count() -> None:
        nonlocal most
        while not ended.wait(0.002):
            targets = []
            for descriptor in Path("/proc/self/fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    targets.append(str(descriptor.readlink()))
            most = max(most, sum(target.startswith(str(tmp_path)) for target in targets))

    counter = threading.Thread(target=count)
    counter.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    ended.set()
    counter.join()
    assert 0 < most <= MAX_OPEN_SHARDS + 8


def test_an_unreadable_file_is_named(tmp_path: Path):
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(StorageError, match=r"a\.tar cannot be read \(Is a directory\); is its disk mounted"):
        open_storage(tmp_path).read("a.tar", 0, 1)


@pytest.mark.parametrize(
    ("location", "remote"),
    [("/a/b", False), ("a", False), (Path("a"), False), ("file:///a/b", False), ("http://h/a", True), ("s3://b", True)],
)
def test_what_is_remote(location: str | Path, remote: bool):
    assert is_remote(location) is remote


def test_a_file_url_is_a_folder(tmp_path: Path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x").write_bytes(b"123")
    assert local_folder(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert open_storage(f"file://{tmp_path}/a%20b").read("x", 1, 1) == b"2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_s": 0.0}, "data.storage.timeout_s=0.0 must be above 0, and finite; 20 is usual."),
        ({"timeout_s": float("nan")}, "data.storage.timeout_s=nan must be above 0, and finite"),
        ({"retry_for_s": -1.0}, "data.storage.retry_for_s=-1.0 must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        StorageConfig(**settings)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("foo://bucket/x", "foo://bucket/x cannot be read: ValueError: Protocol not known: foo; check the scheme."),
        ("http://", "http:// names no server or bucket; write it as http://NAME/folder."),
    ],
)
def test_a_location_that_nothing_reads_is_refused(location: str, message: str):
    with pytest.raises(ValueError, match=message):
        open_storage(location, StorageConfig(allow_schemes=["foo"]))
