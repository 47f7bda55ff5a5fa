"""Snapshots of averages on disk: whole or not at all, and what is broken is named."""

import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iccld.outcome import AGAIN, status_of, words
from iccld.programs.evaluate.averaging import read_snapshots, write_due_snapshot, write_snapshot


def snapshot(folder: Path, *, step: int = 8) -> Path:
    return write_snapshot(folder, {"ema_0.050/w": torch.ones(100)}, step=step, widths=[0.05])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not a whole snapshot"),
        (lambda path: path.write_bytes(b""), "is not a whole snapshot"),
        (lambda path: path.write_bytes(b"\xff" * 300), "is not a whole snapshot"),
        (lambda path: path.rename(path.with_name("step_00000024.safetensors")), "does not hold what it says, step 8"),
    ],
)
def test_a_broken_snapshot_is_named(tmp_path: Path, damage: Callable[[Path], object], words: str):
    snapshot(tmp_path, step=16)
    damage(snapshot(tmp_path))
    with pytest.raises(ValueError, match=r"step_000000(08|24).safetensors") as error:
        read_snapshots(tmp_path)
    assert words in str(error.value) and "remove it: the others will do" in str(error.value)


def test_half_written_snapshots_and_other_files_are_not_seen(tmp_path: Path):
    snapshot(tmp_path, step=8)
    snapshot(tmp_path, step=4)
    (tmp_path / "step_00000012.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").touch()
    assert [(s.step, s.widths) for s in read_snapshots(tmp_path)] == [(4, (0.05,)), (8, (0.05,))]


def test_a_full_disk_leaves_the_earlier_snapshot_and_no_scrap(tmp_path: Path):
    path = snapshot(tmp_path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*step_00000008.safetensors") as caught:
            snapshot(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status_of(caught.value) == AGAIN and "ulimit -f" in words(caught.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_training_goes_on_without_a_snapshot_for_which_there_is_no_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    profile = SimpleNamespace(snapshot_every=4, widths=[0.05])
    profiles = SimpleNamespace(state_dict=lambda: {"ema_0.050/w": torch.ones(100)})
    stage: Any = SimpleNamespace(ema_profile=profile, profiles=profiles)
    backend, ranks = SimpleNamespace(full=lambda tensors: tensors), SimpleNamespace(is_main=True)
    engine: Any = SimpleNamespace(backend=backend, ranks=ranks)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        write_due_snapshot(stage, tmp_path, engine, step=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the snapshot of step 8 cannot be written (" in capfd.readouterr().err and not list(tmp_path.iterdir())
    write_due_snapshot(stage, tmp_path, engine, step=12)
    assert [snapshot.step for snapshot in read_snapshots(tmp_path)] == [12]


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path):
    words = r"after step 8, ema_0.050/w is not finite in .* set stage1\.objective\.ema_profile\.widths=\[\]"
    with pytest.raises(ValueError, match=words):
        write_snapshot(tmp_path / "stage1/ema", {"ema_0.050/w": torch.full((2,), 1e5)}, step=8, widths=[0.05])
    assert not list(tmp_path.iterdir())
