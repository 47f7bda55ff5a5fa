"""Checkpoints appear whole or not at all, and a damaged one is named and passed over."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iccld.durable import file_checksum
from iccld.models.denoiser import Denoiser
from iccld.models.settings import DenoiserConfig
from iccld.runtime.checkpoint.errors import CheckpointError
from iccld.runtime.checkpoint.manifest import verify
from iccld.runtime.checkpoint.pieces import whole
from iccld.runtime.checkpoint.store import ALIGNMENT, PIECE_BYTES, CheckpointStore, in_pieces
from iccld.runtime.ranks import Ranks
from iccld.runtime.settings import CheckpointConfig
from tests.runtime.checkpoint.factory import ABOUT, flip, save, store


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
    checkpoints = CheckpointStore(tmp_path, config, Ranks(), announce=announced.append)
    weight = torch.zeros(1_000_000)
    for step in range(1, 4):
        weight.fill_(step)
        checkpoints.save(step, {"module/weight": whole(weight)}, ABOUT)
        weight.fill_(-1.0)  # training goes on
    checkpoints.wait()
    assert announced == [1, 2, 3]
    checkpoint = checkpoints.newest()
    assert checkpoint and torch.equal(checkpoint.reader.tensor("module/weight"), torch.full((1_000_000,), 3.0))


@given(st.lists(st.integers(0, 3000), max_size=40))
def test_blocks_lie_apart_in_few_pieces(sizes: list[int]):
    places, lengths = in_pieces(sizes, length=1024)
    for piece, length in enumerate(lengths):
        inside = [(begin, size) for (number, begin), size in zip(places, sizes, strict=True) if number == piece]
        ends = [begin + size for begin, size in inside]
        assert inside and all(begin % ALIGNMENT == 0 for begin, _ in inside) and max(ends) <= length
        assert all(end <= begin for end, (begin, _) in zip(ends, inside[1:], strict=False))
        assert length <= 1024 or len(inside) == 1


def test_pinned_memory_is_little_more_than_what_it_holds():
    """Pinned memory comes in powers of two; it holds the weights, moments and teacher of a denoiser."""
    with torch.device("meta"):
        denoiser = Denoiser(config=DenoiserConfig(width=352), latent_channels=4, condition_channels=4)
    sizes = [4 * parameter.numel() for parameter in denoiser.parameters()] * 4
    _, lengths = in_pieces(sizes, length=PIECE_BYTES)
    taken = sum(1 << (length - 1).bit_length() for length in lengths)
    assert sum(sizes) > 5e9 and taken < 1.15 * sum(sizes)
    assert sum(1 << (size - 1).bit_length() for size in sizes) > 1.3 * sum(sizes)


def test_tensors_of_all_kinds_go_through_memory_that_is_kept(tmp_path: Path):
    checkpoints, places = store(tmp_path, asynchronous=True), set()
    for step in (1, 2, 3):
        tensors = {
            "a": torch.randn(7, 3).bfloat16(),
            "b": torch.tensor([step]),
            "c": torch.rand(5) > 0.5,
            "d": torch.empty(0),
            "e": torch.randn(7, 5, dtype=torch.float64),
        }
        checkpoints.save(step, {name: whole(tensor) for name, tensor in tensors.items()}, ABOUT)
        checkpoints.wait()
        checkpoint = checkpoints.newest()
        assert checkpoint and checkpoint.step == step
        assert all(torch.equal(checkpoint.reader.tensor(name), tensor) for name, tensor in tensors.items())
        places.add(checkpoints._memory[0].data_ptr())
    assert len(places) == 1


def test_a_background_save_that_failed_is_reported_by_the_next(tmp_path: Path, small_disk: Path):
    checkpoints = store(small_disk, asynchronous=True)
    save(checkpoints, 1)
    assert not checkpoints.has_failed
    checkpoints.save(2, {"module/weight": whole(torch.zeros(4_000_000))}, ABOUT)
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

        patch.setattr("iccld.runtime.checkpoint.manifest.file_checksum", fail)
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


@pytest.mark.parametrize("stray", ["step_00000008.tmp", "step_00000007.tmp", "step_backup.tmp"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "foreign folder"])
def test_a_stray_name_stops_no_save_and_is_left(tmp_path: Path, kind: str, stray: str):
    folder, home, reports = tmp_path / "checkpoints", tmp_path / "home", list[str]()
    for made in (folder, home):
        made.mkdir()
    (home / "rank_00000.safetensors").write_text("precious")
    if kind == "file":
        (folder / stray).write_text("")
    elif kind == "foreign folder":
        (folder / stray).mkdir()
        (folder / stray / "notes.txt").write_text("precious")
    else:
        (folder / stray).symlink_to(home if kind == "link" else tmp_path / "absent")
    checkpoints = store(folder, reports)
    for step in (8, 9, 10):
        verify(save(checkpoints, step))
    assert os.path.lexists(folder / stray) and [said for said in reports if stray in said] == reports
    assert len(reports) == 1 and "is left as it is" in reports[0]
    assert (home / "rank_00000.safetensors").read_text() == "precious" and len(list(home.iterdir())) == 1
    assert kind != "foreign folder" or (folder / stray / "notes.txt").is_file()


def test_a_linked_checkpoint_is_read_and_never_deleted(tmp_path: Path):
    """The user may start from another run's."""
    save(store(tmp_path / "other"), 1)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "step_00000001").symlink_to(tmp_path / "other" / "step_00000001")
    reports: list[str] = []
    checkpoints = store(tmp_path / "own", reports)
    newest = checkpoints.newest()
    assert newest and newest.step == 1
    for step in (2, 3, 4):
        save(checkpoints, step)
    assert [path.name for path in checkpoints.folders()] == ["step_00000001", "step_00000003", "step_00000004"]
    verify(tmp_path / "other" / "step_00000001")
    assert len(reports) == 1 and "step_00000001 is a link; it is left" in reports[0]


def test_one_that_cannot_be_removed_stops_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file server keeps what somebody reads; a user may have protected it."""

    def fail(folder: Path) -> None:
        raise OSError(39, "Directory not empty", str(folder))

    reports: list[str] = []
    checkpoints = store(tmp_path, reports)
    with monkeypatch.context() as patch:
        patch.setattr("iccld.durable.remove_tree", fail)
        for step in (1, 2, 3, 4):
            verify(save(checkpoints, step))
        assert [said for said in reports if "step_00000001 cannot be removed" in said] == reports[:1]
    newest = checkpoints.newest()
    assert newest and newest.step == 4 and len(reports) == 2
    save(checkpoints, 5)
    assert [folder.name for folder in checkpoints.folders()] == ["step_00000004", "step_00000005"]


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
        checkpoints.save(2, {"module/weight": whole(torch.zeros(4_000_000))}, ABOUT)
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


def test_keeping_fewer_than_two_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint.keep=1 must be at least 2"):
        CheckpointConfig(keep=1)


def test_what_cannot_be_listed_stops_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reports: list[str] = []
    checkpoints, closed = store(tmp_path, reports), tmp_path / "step_00000001.tmp"
    closed.mkdir()
    scandir = os.scandir

    def listing(path: Any = ".") -> Any:  # rights do not bind root, who may run this
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    assert save(checkpoints, 1).is_dir() and closed.is_dir()
    assert reports == [f"{closed} is no checkpoint that was torn; it is left as it is"]
