"""Whole files that are copied to this node: the parts of an index."""

import multiprocessing
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iccld.data.storage.base import MissingShard, StorageConfig, StorageError
from iccld.data.storage.open import open_storage
from iccld.data.storage.open_index import fetch_file, user_cache_folder
from tests.services import FaultyServer

Start = Callable[..., FaultyServer]
CONTENT = np.random.default_rng(0).bytes(1_000_000)
CHECKSUM = zlib.crc32(CONTENT)
SIZES = range(len(CONTENT) + 1)
PATIENT = StorageConfig(timeout_s=5.0, retry_for_s=60.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(CONTENT)
    return tmp_path / "set"


def test_a_fetched_file_is_kept_while_it_is_right(folder: Path, tmp_path: Path, faulty_server: Start):
    server = faulty_server(folder, share=0.0)
    storage = open_storage(server.url, PATIENT)
    storage.piece_bytes = 100_000  # type: ignore[misc]
    path = fetch_file(storage, "a.tar", tmp_path, sizes=SIZES, checksum=CHECKSUM)
    assert path == tmp_path / "a.tar" and path.read_bytes() == CONTENT
    asked = server.requests
    fetch_file(storage, "a.tar", tmp_path, sizes=SIZES, checksum=CHECKSUM)
    assert server.requests == asked == 11
    path.write_bytes(CONTENT[:-1])
    fetch_file(storage, "a.tar", tmp_path, sizes=SIZES, checksum=CHECKSUM)
    assert path.read_bytes() == CONTENT


def test_a_file_that_does_not_arrive_leaves_the_old_one(folder: Path, tmp_path: Path, faulty_server: Start):
    storage = open_storage(faulty_server(folder, share=0.0).url, PATIENT)
    (tmp_path / "a.tar").write_bytes(b"old")
    with pytest.raises(StorageError, match=rf"a\.tar: its checksum is {CHECKSUM:08x}, it should be 00000001; upload"):
        fetch_file(storage, "a.tar", tmp_path, sizes=SIZES, checksum=1)
    with pytest.raises(MissingShard):
        fetch_file(storage, "none", tmp_path, sizes=SIZES, checksum=1)
    with pytest.raises(StorageError, match="no plain file name"):
        fetch_file(storage, "../a.tar", tmp_path / "set", sizes=SIZES, checksum=1)
    assert (tmp_path / "a.tar").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.tar.lock", ".none.lock", "a.tar", "set"]


def test_what_a_killed_copy_left_is_removed_after_a_day(folder: Path, tmp_path: Path):
    ages = {".a.tar.1.tmp": 90_000, ".a.tar.2.tmp": 100, ".b.tar.1.tmp": 90_000}
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    fetch_file(open_storage(folder), "a.tar", tmp_path, sizes=SIZES, checksum=CHECKSUM)
    assert {path.name for path in tmp_path.glob("*.tmp")} | {".a.tar.2.tmp", ".b.tar.1.tmp"} == {
        path.name for path in tmp_path.glob(".*.tmp")
    }


def test_ranks_that_fetch_at_once_copy_once(folder: Path, tmp_path: Path, faulty_server: Start):
    server = faulty_server(folder, share=0.0)
    storage = open_storage(server.url, PATIENT)
    ranks = [
        multiprocessing.get_context("fork").Process(
            target=fetch_file, args=(storage, "a.tar", tmp_path), kwargs={"checksum": CHECKSUM, "sizes": SIZES}
        )
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert (tmp_path / "a.tar").read_bytes() == CONTENT and server.requests == 2


def test_copies_go_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert user_cache_folder() == Path("/x/iccld")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert user_cache_folder() == Path("/home/a/.cache/iccld")
