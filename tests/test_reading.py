import os
import tracemalloc
from pathlib import Path

import pytest

from iccld.programs.evaluate.results import read_results
from iccld.programs.run.event_times import read_events
from iccld.reading import is_count, read_json, read_limited
from iccld.runtime.checkpoint.errors import DamagedError
from iccld.runtime.checkpoint.manifest import MANIFEST, read_manifest


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_limited(path, 5) == b"12345"
    with pytest.raises(ValueError, match=r"a has more than 4 bytes, and should be much smaller"):
        read_limited(path, 4)
    with pytest.raises(FileNotFoundError):
        read_limited(tmp_path / "none")


def test_a_large_limit_takes_no_memory_before_there_is_a_byte(tmp_path: Path) -> None:
    """Addresses of the process count too, which a cluster may limit."""
    path = tmp_path / "a"
    path.write_bytes(b"1" * 3_000_000)
    tracemalloc.start()
    assert len(read_limited(path, 1 << 40)) == 3_000_000
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\udcff", "9" * 5000])
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"a is not JSON \(.*\)\.$"):
        read_json(path)


READERS = {
    "config": (lambda folder: read_limited(folder / "file"), "file"),
    "manifest": (read_manifest, MANIFEST),
    "results": (lambda folder: read_results(folder / "results.json"), "results.json"),
    "events": (read_events, "events.jsonl"),
}


@pytest.mark.parametrize("kind", READERS)
def test_endless_files_end_no_reader(tmp_path: Path, kind: str) -> None:
    read, name = READERS[kind]
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises((ValueError, DamagedError)):
        read(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises((ValueError, DamagedError)):
        read(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises((ValueError, DamagedError)):
        read(tmp_path)


def test_a_count_is_a_whole_number_that_a_float_holds() -> None:
    assert all(map(is_count, (0, 1, 2**53 - 1)))
    assert not any(map(is_count, (-1, 1.0, True, "1", None, 2**53, float("inf"))))
