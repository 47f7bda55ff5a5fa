"""Part tests: the tests that need a device."""

import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def suite(folder: Path) -> dict[str, Any]:
    """How many passed, failed and were skipped, and the names of those that failed."""
    log = folder / "tests.log"
    command = ["bash", "tools/test.sh", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log.write_text(done.stdout + done.stderr)
    counts: dict[str, Any] = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    if done.returncode:
        counts["failed"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M) or done.stderr[-500:]
    return counts
