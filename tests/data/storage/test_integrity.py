"""An index with a flipped bit: named with file and remedy, or the same order and samples as before."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from iccld.batch_layout import BatchLayout
from iccld.data.storage import integrity
from iccld.data.storage.base import StorageError
from iccld.data.storage.index import ARRAY_FILES, HEADER_FILE, MAX_HEADER_BYTES, ShardIndex, write_index
from iccld.data.storage.open import open_storage
from iccld.data.storage.open_index import open_index
from iccld.data.storage.reader import ShardReader
from iccld.data.stream.order import RareClassOrder
from iccld.data.stream.stream import TrainingStream
from tests.data.conftest import Site
from tests.data.factory import config, make_set

FLIPS_A_FILE = 150


def seen(folder: Path) -> object:
    """Return what a run sees of a set: the order by classes and by epochs, the samples' bytes, and the fingerprint."""
    settings = config({"source": str(folder), "target": str(folder)}, rare_class_sampling=True)
    settings.rare_class_min_pixels = 20
    stream = TrainingStream(settings, seed=3, layout=BatchLayout(4, 4))
    found = [stream.fingerprints()["source"]["index"]]
    for domain in stream.domains.values():
        draws = [domain.order[number] for number in range(40)]
        read = domain.parts[0].reader.read_all([draw.index for draw in draws[:8]], with_labels=True)
        found.append((draws, read, domain.parts[0].index.header.class_pixels))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_set(tmp_path_factory.mktemp("whole"), 12).location)


def copy_of(whole: Path, target: Path) -> Path:
    shutil.copytree(whole, target, copy_function=os.link)
    shutil.rmtree(target / "index")
    shutil.copytree(whole / "index", target / "index")
    return target


@pytest.mark.parametrize("name", [*ARRAY_FILES, HEADER_FILE])
def test_a_flipped_bit_is_named_or_changes_nothing(whole: Path, tmp_path: Path, name: str) -> None:
    expected, draw = seen(whole), random.Random(name)
    size = (whole / "index" / name).stat().st_size
    bits = {draw.randrange(8 * size) for _ in range(FLIPS_A_FILE)} | set(range(0, 8 * min(size, 128), 23))
    named = 0
    for bit in sorted(bits):
        folder = copy_of(whole, tmp_path / f"{bit}")
        path = folder / "index" / name
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = seen(folder)
        except ValueError as error:
            assert str(folder / "index") in str(error) and ("; re" in str(error)), (bit, error)
            assert "\n" not in str(error)
            named += 1
        else:
            assert found == expected, f"bit {bit} of {name} changes the order in silence"
        shutil.rmtree(folder)
    assert named == len(bits) if name != HEADER_FILE else named > len(bits) / 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_pixels", [7] * 19),
        ("class_samples", None),
        ("min_size", [1, 1]),
        ("num_bytes", 5),
        ("has_labels", False),
    ],
)
def test_what_a_header_says_is_counted(whole: Path, tmp_path: Path, field: str, value: object) -> None:
    folder = copy_of(whole, tmp_path / "set")
    path = folder / "index" / HEADER_FILE
    header = json.loads(path.read_text())
    first, *others, last = header["class_samples"]
    header[field] = value if value is not None else [first - 1, *others, last + 1]
    path.write_text(json.dumps(header))
    with pytest.raises(ValueError, match=rf"index.json: its {field} is not that of samples.npy; restore it, or remove"):
        seen(folder)


def test_one_rank_of_a_node_checks_once(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(integrity, "check", lambda index: checked.append(index.folder))
    folder = copy_of(whole, tmp_path / "set")
    monkeypatch.setenv("LOCAL_RANK", "1")
    seen(folder)
    assert not checked
    monkeypatch.setenv("LOCAL_RANK", "0")
    seen(folder)
    seen(folder)
    assert checked == [folder / "index"]


LARGE = """
import sys, time
from pathlib import Path
from iccld.data.storage import integrity
from iccld.batch_layout import BatchLayout
from iccld.data.stream.stream import TrainingStream
from tests.data.factory import config
integrity.AT_ONCE_BYTES = 0
folder, workers = sys.argv[1], int(sys.argv[2])
data = config({"source": folder, "target": folder}, num_workers=workers)
stream = TrainingStream(data, seed=3, layout=BatchLayout(4, 4))
for number, batch in enumerate(stream.batches(0)):
    print(number, flush=True)
    time.sleep(0.05)
    if number == 200:
        break
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_damage_that_is_found_beside_the_work_ends_it_at_the_next_batch(
    whole: Path, tmp_path: Path, workers: str
) -> None:
    folder = copy_of(whole, tmp_path / "set")
    path = folder / "index" / "samples.npy"
    data = bytearray(path.read_bytes())
    place = data.index(b"frame_011")
    data[place] ^= 1  # a key, which nothing else looks at
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(folder), workers], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and len(done.stdout.split()) < 100
    assert f"ValueError: {path}: it is not what index.json says (checksum); restore it" in done.stderr


def test_a_check_leaves_the_cores_to_the_work(tmp_path: Path) -> None:
    index = make_set(tmp_path / "small", 4)
    samples, folder = np.tile(index.samples, 50_000), tmp_path / "large" / "index"
    folder.mkdir(parents=True)
    write_index(folder, dataset="", shards=index.shards, samples=samples)
    large = ShardIndex.open(folder.parent)
    began = time.thread_time()
    integrity.check(large)
    spent = time.thread_time() - began
    started = time.monotonic()
    assert not [*integrity.faults(large, share=0.1)]
    assert time.monotonic() - started > 5 * spent


def test_a_place_in_classes_beyond_the_samples_is_named() -> None:
    pixels, beyond = np.full((3, 1), 10, np.uint32), [np.array([0, 1, 7], np.uint32)]
    with pytest.raises(ValueError, match=r"classes.npy of an index names sample 7 of 3; the index is damaged"):
        order = RareClassOrder(pixels, beyond, totals=np.array([30]), members=[[0]], seed=0, stream="s", min_pixels=0)
        for number in range(100):
            order[number]
    excluded = [np.array([], np.uint32), np.array([0, 1, 2], np.uint32)]  # all show the first, whose list is empty
    with pytest.raises(ValueError, match=r"no image is found"):
        order = RareClassOrder(
            np.full((3, 2), 10, np.uint32), excluded, totals=np.array([30, 30]), members=[[0, 1]], seed=0, stream="s",
            min_pixels=0,
        )  # fmt: skip
        order[0]


def test_a_shard_that_is_not_there_is_named(whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "set")
    records = np.load(folder / "index" / "samples.npy", mmap_mode="r+")
    records["shard"][5] = 99
    records.flush()
    index = ShardIndex.open(folder)
    reader = ShardReader(index, open_storage(folder))
    for ask in (lambda: reader.read(5, with_labels=True), lambda: reader.bad(5, "x")):
        with pytest.raises(ValueError, match=r"index: .*; restore it, or remove"):
            ask()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"version": 2, "num_samples": ' + "9" * 5000 + "}",
        "null",
        "[]",
        "\udcff",
        '{"version": 2}',
        " " * 10,
    ],
)
def test_a_header_that_is_none_is_named(whole: Path, tmp_path: Path, text: str) -> None:
    folder = copy_of(whole, tmp_path / "set")
    (folder / "index" / HEADER_FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"index.json is damaged \(.*\); remove the index and make"):
        ShardIndex.open(folder)


@pytest.mark.parametrize(
    "head",
    ["(" * 5000, "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", "{'descr': [('a', '<u4'", "lambda: 0"],
)
def test_an_array_whose_own_header_is_none_is_named(whole: Path, tmp_path: Path, head: str) -> None:
    folder = copy_of(whole, tmp_path / "set")
    text = head.encode().ljust(9000) + b"\n"
    (folder / "index" / "samples.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(ValueError, match=r"samples.npy does not fit index.json \(.*\); restore it, or remove"):
        ShardIndex.open(folder)


def test_files_of_a_server_have_limits(
    whole: Path, nginx: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy_of(whole, nginx.folder / "sized")
    storage, url = open_storage(f"{nginx.url}/sized"), f"{nginx.url}/sized"
    os.truncate(nginx.folder / "sized/index/samples.npy", 1 << 40)
    with pytest.raises(
        StorageError, match=r"samples.npy has 1,099,511,627,776 bytes, and should have [\d,]+ to [\d,]+;"
    ):
        open_index(storage, url)
    os.truncate(nginx.folder / "sized/index/index.json", 1 << 40)
    asked = storage.counters["bytes"]
    with pytest.raises(
        StorageError, match=rf"index.json has 1,099,511,627,776 bytes, and should have at most {MAX_HEADER_BYTES:,};"
    ):
        open_index(storage, url)
    assert storage.counters["bytes"] == asked, "nothing was read"
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]
    assert not kept
    shutil.rmtree(nginx.folder / "sized")


def test_a_copy_on_this_node_that_is_damaged_is_fetched_anew(
    whole: Path, nginx: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(whole, nginx.folder / "copied")
    storage, url = open_storage(f"{nginx.url}/copied"), f"{nginx.url}/copied"
    index = open_index(storage, url, cache_folder=tmp_path)
    path = index.folder / "classes.npy"
    for damage in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:100], lambda data: data + b"x"):
        path.write_bytes(damage(path.read_bytes()))
        (index.folder / HEADER_FILE).write_text("{}")
        index = open_index(storage, url, cache_folder=tmp_path)
        integrity.check(index)
    monkeypatch.setattr(integrity, "AT_ONCE_BYTES", 0)  # a large one is fetched at the next start
    monkeypatch.setattr(integrity, "_damage", [])
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    integrity._check_beside(open_index(storage, url, cache_folder=tmp_path))
    with pytest.raises(ValueError, match=rf"classes.npy: it is not .*; remove {index.folder}, a copy that is fetched"):
        integrity.raise_damage()
    integrity.check(open_index(storage, url, cache_folder=tmp_path))
    assert asdict(index.header) == asdict(ShardIndex.open(whole).header)
    shutil.rmtree(nginx.folder / "copied")
