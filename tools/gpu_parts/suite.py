"""Part tests: the tests that need a device."""

import collections
import re
from pathlib import Path
from typing import Any

from gpu_parts.family import run_within

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"PASSED": "passed", "SKIPPED": "skipped", "FAILED": "failed", "ERROR": "failed"}


def suite(folder: Path, *, limit_s: float) -> dict[str, Any]:
    """Count the tests that passed and were skipped, and name those that failed; at the limit, of those that ran."""
    log = folder / "tests.log"
    command = ["bash", "tools/test.sh", "gpu", "-v", "-p", "no:cacheprovider", "-n", "4"]
    status = run_within(limit_s, command, log=log, cwd=ROOT)
    ended: dict[str, set[str]] = collections.defaultdict(set)
    for word, name in re.findall(
        rf"({'|'.join(WORDS)}) (?:\[[ \d]+%\] )?(tests/\S+::.*?)(?: - .*)?$", log.read_text(), re.M
    ):
        ended[WORDS[word]].add(name.strip())
    counts: dict[str, Any] = {word: len(names) for word, names in ended.items()}
    if status != 0:
        why = f"not over within {limit_s:g} s" if status is None else f"status {status}"
        counts["failed"] = [why, *(sorted(ended["failed"]) or [log.read_text()[-500:]])]
    return counts
