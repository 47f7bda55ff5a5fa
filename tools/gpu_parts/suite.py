"""Part tests: the tests that need a device, in the files that hold them, with nothing but pytest."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def files_with_gpu_tests() -> list[str]:
    """The test files that mark tests for a GPU; others may need packages that a bare machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "@pytest.mark.gpu" in file.read_text()]


def suite(folder: Path) -> dict[str, Any]:
    """How many passed, failed and were skipped, and the names of those that failed."""
    log = folder / "tests.log"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files_with_gpu_tests()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    log.write_text(done.stdout + done.stderr)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    return {**counts, "status": done.returncode, "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)}
