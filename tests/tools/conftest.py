"""The scripts of tools/ import one another by name, as when they are run."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path[:0] = [str(TOOLS), str(TOOLS / "benchmarks"), str(TOOLS / "scripts")]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return the words with which a script ends, with status 1: it runs in this process, and in the test's folder."""

    def words(script: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOLS / script), run_name="__main__")
        assert isinstance(end.value.code, str), end.value.code
        return end.value.code

    return words
