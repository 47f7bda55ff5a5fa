"""Checkpoints appear whole or not at all, and a damaged one is named and passed over."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from iccld.durable import file_checksum
from iccld.runtime.checkpoint import CheckpointConfig, CheckpointStore
from iccld.runtime.manifest import CheckpointError, DamagedError, ForeignFormatError, verify
from iccld.runtime.pieces import whole


class OneRank:
    rank, world_size = 0, 1

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    gather_saved = gather_objects


def store(folder: Path, reports: list[str] | None = None, *, asynchronous: bool = False) -> CheckpointStore:
    reports = reports if reports is not None else []
    return CheckpointStore(folder, CheckpointConfig(asynchronous=asynchronous), OneRank(), report=reports.append)


def save(checkpoints: CheckpointStore, step: int) -> Path:
    runs = {"module/weight": whole(torch.full((8, 8), float(step))), "exp_avg/weight": whole(torch.ones(8, 8))}
    checkpoints.save(step, runs, {"stage": "stage1"})
    return checkpoints.folder / f"step_{step:08d}"


def test_what_is_saved_is_loaded(tmp_path: Path):
    checkpoints = store(tmp_path)
    assert checkpoints.newest() is None
    save(checkpoints, 7)
    checkpoint = checkpoints.newest()
    assert checkpoint and checkpoint.step == 7 and checkpoint.manifest["stage"] == "stage1"
    assert torch.equal(checkpoint.reader.tensor("module/weight"), torch.full((8, 8), 7.0))
    assert (tmp_path / "latest").read_text() == "step_00000007"


def test_a_background_save_keeps_what_was_when_it_was_asked_for(tmp_path: Path):
    announced: list[int] = []
    config = CheckpointConfig(asynchronous=True)
    checkpoints = CheckpointStore(tmp_path, config, OneRank(), announce=announced.append)
    weight = torch.zeros(1_000_000)
    for step in range(1, 4):
        weight.fill_(step)
        checkpoints.save(step, {"module/weight": whole(weight)}, {})
        weight.fill_(-1.0)  # training goes on
    checkpoints.wait()
    assert announced == [1, 2, 3]
    checkpoint = checkpoints.newest()
    assert checkpoint and torch.equal(checkpoint.reader.tensor("module/weight"), torch.full((1_000_000,), 3.0))


def test_a_background_save_that_failed_is_reported_by_the_next(tmp_path: Path, small_disk: Path):
    checkpoints = store(small_disk, asynchronous=True)
    save(checkpoints, 1)
    assert not checkpoints.has_failed
    checkpoints.save(2, {"module/weight": whole(torch.zeros(4_000_000))}, {})
    limit = time.monotonic() + 60
    while not checkpoints.has_failed and time.monotonic() < limit:
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=r"step_00000002 was not written.*No space left on device"):
        save(checkpoints, 3)
    assert not checkpoints.has_failed
    newest = checkpoints.newest()
    assert newest and newest.step == 1


def test_the_step_that_was_saved_last_is_not_written_again(tmp_path: Path):
    """A stop just after a save must not take away the checkpoint that it is about to replace."""
    checkpoints = store(tmp_path)
    before = save(checkpoints, 5).stat().st_ino
    assert save(checkpoints, 5).stat().st_ino == before
    assert save(checkpoints, 6).stat().st_ino != before


def test_older_ones_go_only_after_a_newer_is_whole(tmp_path: Path):
    checkpoints = store(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert [folder.name for folder in checkpoints.folders()] == ["step_00000002", "step_00000003"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
):
    reports: list[str] = []
    checkpoints = store(tmp_path, reports)
    save(checkpoints, 1)
    damaged = save(checkpoints, 2)
    damage(damaged / name)
    checkpoint = checkpoints.newest()
    assert checkpoint and checkpoint.step == 1
    assert len(reports) == 1 and name in reports[0] and damaged.name in reports[0]


def test_a_save_after_a_fall_back_keeps_the_whole_ones_and_drops_the_damaged(tmp_path: Path):
    checkpoints = store(tmp_path)
    for step in (100, 200, 300):
        save(checkpoints, step)
    flip(tmp_path / "step_00000300" / "rank_00000.safetensors")
    newest = checkpoints.newest()
    assert newest and newest.step == 200
    save(checkpoints, 250)
    assert [folder.name for folder in checkpoints.folders()] == ["step_00000200", "step_00000250"]


@pytest.mark.parametrize("said", ["step_00000001", "", None])
def test_latest_names_the_newest_whole_one_again(tmp_path: Path, said: str | None):
    """A kill between the rename and `latest` of a run's last save would leave it behind for ever."""
    checkpoints = store(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    latest = tmp_path / "latest"
    latest.unlink() if said is None else latest.write_text(said)
    assert checkpoints.newest()
    assert latest.read_text() == "step_00000002"
    flip(tmp_path / "step_00000002" / "rank_00000.safetensors")
    assert checkpoints.newest()
    assert latest.read_text() == "step_00000001"


def test_no_bit_of_a_manifest_can_be_flipped_unseen(tmp_path: Path):
    path = save(store(tmp_path), 1) / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedError, match=r"damaged: manifest\.json"):
            verify(path.parent)


def test_what_cannot_be_read_now_is_passed_over_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that is away for a while must not cost the checkpoints on it."""
    for step in (1, 2):
        save(store(tmp_path), step)
    reports: list[str] = []
    checkpoints = store(tmp_path, reports)
    with monkeypatch.context() as patch:
        away = tmp_path / "step_00000002" / "rank_00000.safetensors"

        def fail(path: Path) -> str:
            if path == away:
                raise OSError(5, "Input/output error")
            return file_checksum(path)

        patch.setattr("iccld.runtime.manifest.file_checksum", fail)
        newest = checkpoints.newest()
        assert newest and newest.step == 1 and "Input/output error" in reports[0]
    save(checkpoints, 2)
    save(checkpoints, 3)
    kept = list(tmp_path.glob("step_00000002.aside_*"))
    assert len(kept) == 1 and (kept[0] / "rank_00000.safetensors").is_file()
    assert [folder.name for folder in checkpoints.folders()] == ["step_00000002", "step_00000003"]


def test_torn_saves_are_cleared_by_the_next(tmp_path: Path):
    (tmp_path / "step_00000007.tmp").mkdir()
    save(store(tmp_path), 8)
    assert not list(tmp_path.glob("*.tmp"))


def test_when_all_are_damaged_the_run_does_not_start_anew_in_silence(tmp_path: Path):
    checkpoints = store(tmp_path)
    (save(checkpoints, 1) / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"all 1 are damaged or unreadable; .* remove the folder"):
        checkpoints.newest()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield folder
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_nothing_that_was_saved(small_disk: Path):
    checkpoints = store(small_disk)
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match=r"was not written; .* Make room, .*rank 0: .*No space left"):
        checkpoints.save(2, {"module/weight": whole(torch.zeros(4_000_000))}, {})
    newest = checkpoints.newest()
    assert newest and newest.step == 1
    save(checkpoints, 2)
    newest = checkpoints.newest()
    assert newest and newest.step == 2


def test_a_folder_that_cannot_be_written_is_named(small_disk: Path):
    checkpoints = store(small_disk)
    save(checkpoints, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"step_00000002 was not written.*Read-only file system"):
        save(checkpoints, 2)
    newest = checkpoints.newest()
    assert newest and newest.step == 1


def test_another_format_is_refused_and_kept(tmp_path: Path):
    """By an older version of iccld, after a newer one: going on from an older step would overwrite good work."""
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    folder = save(checkpoints, 2)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ForeignFormatError, match="has format 99, and this version of iccld reads 2"):
        verify(folder)
    with pytest.raises(CheckpointError, match="has format 99"):
        checkpoints.newest()
    assert folder.is_dir()


def test_keeping_fewer_than_two_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint.keep=1 must be at least 2"):
        CheckpointConfig(keep=1)
