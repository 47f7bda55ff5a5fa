"""Checkpoints appear whole or not at all, and a damaged one is named and passed over."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iccld.runtime.checkpoint import CheckpointConfig, CheckpointError, CheckpointStore, verify


class OneRank:
    rank, world_size = 0, 1

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


def store(folder: Path, reports: list[str] | None = None) -> CheckpointStore:
    return CheckpointStore(
        folder, CheckpointConfig(), OneRank(), report=(reports if reports is not None else []).append
    )


def save(checkpoints: CheckpointStore, step: int) -> Path:
    parts = {
        "module": {"weight": torch.full((64,), float(step))},
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(step))}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        },
    }
    return checkpoints.save(step, parts, {"stage": "stage1"})


def test_what_is_saved_is_loaded(tmp_path: Path):
    checkpoints = store(tmp_path)
    assert checkpoints.newest() is None
    save(checkpoints, 7)
    checkpoint = checkpoints.newest()
    assert checkpoint and checkpoint.step == 7 and checkpoint.manifest["stage"] == "stage1"
    assert torch.equal(checkpoint.load("module")["weight"], torch.full((64,), 7.0))
    assert checkpoint.load("optimizer")["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99)}]
    assert (tmp_path / "latest").read_text() == "step_00000007"


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
@pytest.mark.parametrize("name", ["module.safetensors", "optimizer.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
):
    reports: list[str] = []
    checkpoints = store(tmp_path, reports)
    save(checkpoints, 1)
    damaged = save(checkpoints, 2)
    if name == "manifest.json" and damage is flip:
        (damaged / name).write_text("{" + (damaged / name).read_text())
    else:
        damage(damaged / name)
    checkpoint = checkpoints.newest()
    assert checkpoint and checkpoint.step == 1
    assert len(reports) == 1 and name in reports[0] and damaged.name in reports[0]


def test_a_save_after_a_fall_back_keeps_the_whole_ones_and_drops_the_damaged(tmp_path: Path):
    checkpoints = store(tmp_path)
    for step in (100, 200, 300):
        save(checkpoints, step)
    flip(tmp_path / "step_00000300" / "module.safetensors")
    save(checkpoints, 250)  # as after going on from 200
    assert [folder.name for folder in checkpoints.folders()] == ["step_00000200", "step_00000250"]


@pytest.mark.parametrize("key", ["parts", "step", "files", "format"])
def test_a_manifest_that_lacks_a_key_is_damage(tmp_path: Path, key: str):
    path = save(store(tmp_path), 1) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"damaged: manifest.json cannot be read"):
        verify(path.parent)


def test_torn_saves_are_cleared_by_the_next(tmp_path: Path):
    (tmp_path / "step_00000007.tmp").mkdir()
    save(store(tmp_path), 8)
    assert not list(tmp_path.glob("*.tmp"))


def test_when_all_are_damaged_the_run_does_not_start_anew_in_silence(tmp_path: Path):
    checkpoints = store(tmp_path)
    (save(checkpoints, 1) / "module.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"all 1 are damaged; remove the folder"):
        checkpoints.newest()


def test_a_torn_save_leaves_the_last_whole_one_and_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = store(tmp_path)
    save(checkpoints, 1)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(CheckpointError, match=r"was not written; .* Make room, .*rank 0: .*No space left"):
            save(checkpoints, 2)
    newest = checkpoints.newest()
    assert newest and newest.step == 1
    save(checkpoints, 2)
    newest = checkpoints.newest()
    assert newest and newest.step == 2


def test_another_format_is_refused(tmp_path: Path):
    folder = save(store(tmp_path), 1)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has format 99, not 1"):
        verify(folder)


def test_keeping_fewer_than_two_is_refused():
    with pytest.raises(ValueError, match=r"checkpoint.keep=1 must be at least 2"):
        CheckpointConfig(keep=1)
