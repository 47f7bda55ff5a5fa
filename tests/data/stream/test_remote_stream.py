"""The stream from servers: every sample arrives as from the folder, also where the servers fail, or from the cache."""

import contextlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iccld.data.config import DataConfig
from iccld.data.storage.base import StorageConfig
from iccld.data.storage.cache import CacheConfig
from iccld.data.stream.stream import TrainingStream
from iccld.data.stream.validation import read_validation
from tests import services
from tests.data.conftest import Site
from tests.data.factory import config, layout

STEPS = 12


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache_home"))
    return tmp_path / "cache_home"


def read(data: DataConfig) -> tuple[list[Any], dict[str, int]]:
    """Everything that a stream gives in some steps, and its counters."""
    stream = TrainingStream(data, seed=3, layout=layout())
    found = []
    with contextlib.closing(stream.batches(2)) as batches:
        for batch in itertools.islice(batches, STEPS):
            for part in batch.values():
                arrays = [part[name].numpy().tobytes() for name in ("images", "labels", "valid") if name in part]
                found.append((part["keys"], part["numbers"].tolist(), *arrays))
    return found, stream.counters


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_that_fails_one_request_in_ten_changes_nothing(
    folders: dict[str, str], faulty_server: Callable[..., services.FaultyServer], num_workers: int
) -> None:
    expected, _ = read(config(folders))
    servers = {role: faulty_server(Path(folder), share=0.1, seed=7) for role, folder in folders.items()}
    storage = StorageConfig(timeout_s=0.5, retry_for_s=60)
    urls = {role: server.url for role, server in servers.items()}
    found, counters = read(config(urls, num_workers=num_workers, storage=storage))
    assert found == expected
    failed = sum(sum(server.failed.values()) for server in servers.values())
    assert failed > 10 and all(any(server.failed[fault] for server in servers.values()) for fault in ("500", "half"))
    assert 0 < counters["storage_retries"] <= failed * max(num_workers, 1)


def test_an_object_store_gives_what_the_folder_gives(folders: dict[str, str], s3: str) -> None:
    options = services.upload(Path(folders["source"]), s3, "source-shards")
    data = config({"source": "s3://source-shards"}, storage=StorageConfig(options=options), num_workers=1)
    assert read(data)[0] == read(config({"source": folders["source"]}))[0]
    labels = [sample["labels"].tobytes() for sample in read_validation(data)]
    assert labels == [sample["labels"].tobytes() for sample in read_validation(config(folders))]


def test_the_cache_serves_what_was_fetched_and_heals(
    folders: dict[str, str], nginx: Site, tmp_path: Path, user_cache: Path
) -> None:
    shutil.copytree(folders["source"], nginx.folder / "cached", dirs_exist_ok=True)
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_gib=1.0)
    data = config({"source": f"{nginx.url}/cached"}, cache=cache)
    expected, first = read(data)
    assert 8 < first["cache_puts"] <= 13, "samples, not draws"
    found, second = read(data)
    assert found == expected and second["cache_misses"] == 0
    assert second["storage_bytes"] < first["storage_bytes"] / 2, "only the header of the index"
    entries = [path for path in (tmp_path / "cache" / "samples").glob("*/*") if path.name not in ("lock", "incoming")]
    for path in entries[:5]:
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    found, third = read(data)
    assert found == expected and third["cache_puts"] == 5
    assert not user_cache.exists(), "the index is in the cache's folder, too"


@pytest.mark.parametrize("num_workers", [0, 3])
def test_transfers_are_what_the_server_saw(
    folders: dict[str, str], faulty_server: Callable[..., services.FaultyServer], num_workers: int
) -> None:
    server = faulty_server(Path(folders["source"]), share=0.0)
    stream = TrainingStream(config({"source": server.url}, num_workers=num_workers), seed=3, layout=layout())
    before = server.requests  # of the index
    with contextlib.closing(stream.batches(0)) as batches:
        list(itertools.islice(batches, 3))
    assert 0 < stream.counters["storage_requests"] <= server.requests - before


def test_no_password_is_printed(nginx: Site, folders: dict[str, str]) -> None:
    shutil.copytree(folders["source"], nginx.folder / "secret", dirs_exist_ok=True)
    url = nginx.url.replace("http://", "http://me:sekret@")
    for place, settings in (("nowhere", {}), ("secret", {"crop_size": [512, 512]})):
        with pytest.raises(ValueError, match=place) as raised:
            read(config({"source": f"{url}/{place}"}, **settings))
        assert "sekret" not in str(raised.value)


def test_a_remote_set_without_index_is_named(nginx: Site, folders: dict[str, str]) -> None:
    shutil.copytree(folders["target"], nginx.folder / "bare", dirs_exist_ok=True)
    shutil.rmtree(nginx.folder / "bare" / "index")
    with pytest.raises(ValueError, match=r"data.source.shards=http\S+/bare: index/index.json is missing .*upload"):
        read(config({"source": f"{nginx.url}/bare"}))


def test_a_remote_set_that_is_made_anew_is_read_anew(nginx: Site, folders: dict[str, str]) -> None:
    place = nginx.folder / "renewed"
    for role in ("source", "target"):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folders[role], place)
        stream = TrainingStream(
            config({"source": folders["source"], "target": f"{nginx.url}/renewed"}), seed=0, layout=layout()
        )
        assert len(stream.domains["target"].parts[0].index) == {"source": 13, "target": 11}[role]
