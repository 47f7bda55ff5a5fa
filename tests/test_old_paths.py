"""Scripts that users wrote go on: a path that was moved still runs what it ran."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("path", "usage"),
    [
        ("tools/draw_scenes.py", "[--source SOURCE]"),
        ("tools/reconstruct_ema.py", "--stage {stage1,stage2}"),
        ("launch/local.py", "usage: iccld launch NUM_RANKS"),
    ],
)
def test_an_old_path_runs_what_it_ran_from_any_folder(path: str, usage: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / path), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and usage in done.stdout
