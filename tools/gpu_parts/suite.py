"""Part tests: the tests that need a device."""

import collections
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"PASSED": "passed", "SKIPPED": "skipped", "FAILED": "failed", "ERROR": "failed"}


def suite(folder: Path, *, limit_s: float) -> dict[str, Any]:
    """Count the tests that passed and were skipped, and name those that failed; at the limit, of those that ran."""
    log = folder / "tests.log"
    command = ["bash", "tools/test.sh", "gpu", "-v", "-p", "no:cacheprovider", "-n", "4"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = f"not over within {limit_s:g} s"
    ended: dict[str, set[str]] = collections.defaultdict(set)
    for word, name in re.findall(
        rf"({'|'.join(WORDS)}) (?:\[[ \d]+%\] )?(tests/\S+::.*?)(?: - .*)?$", log.read_text(), re.M
    ):
        ended[WORDS[word]].add(name.strip())
    counts: dict[str, Any] = {word: len(names) for word, names in ended.items()}
    if status:
        counts["failed"] = sorted(ended["failed"]) or [str(status), log.read_text()[-500:]]
    return counts
