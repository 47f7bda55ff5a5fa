"""A save that takes long is not lost where an error ends the training meanwhile."""

import time
from pathlib import Path
from typing import Any

import pytest

from iccld.config import load_config
from iccld.programs.train import train as program
from iccld.runtime.checkpoint import store as checkpoint
from iccld.runtime.checkpoint.manifest import verify
from tests.factory import scene_overrides


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_waits_for_the_save_under_way(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fails: bool
) -> None:
    write_runs = checkpoint.write_runs

    def slow(*arguments: Any) -> Any:
        time.sleep(3)
        if fails:
            raise OSError(28, "No space left on device")
        return write_runs(*arguments)

    def fail_in_step_2(*_: Any, step: int) -> None:
        if step == 2:
            raise ValueError("a fault")

    monkeypatch.setattr(checkpoint, "write_runs", slow)
    monkeypatch.setattr(program, "write_due_snapshot", fail_in_step_2)
    settings = [f"stage1.trainer.{s}" for s in ("num_steps=3", "checkpoint.save_every=1", "evaluate_every=0")]
    config = load_config([*scene_overrides(scene_shards, tmp_path / "run"), "data.validation.shards=", *settings])
    with pytest.raises(ValueError, match="a fault"):
        program.train(config)
    saved = tmp_path / "run/stage1/checkpoints/step_00000001"
    if fails:
        assert not saved.exists() and "step_00000001 was not written" in capfd.readouterr().err
    else:
        assert verify(saved).step == 1
