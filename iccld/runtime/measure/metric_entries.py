"""The lines of metrics.jsonl as entries of the present format; without torch, for those who only look at a run."""

import contextlib
import json
from typing import Any

FORMAT = 2
"""The format of a line of metrics.jsonl. In format 1, which no line names, `step` was the number of steps done before
the last one: 0 after the first."""
FINAL = "final/"
"""The beginning of the names of a finished stage's scores."""


def entries_of(text: str) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, of any format, as entries of the present one; without what a crash has torn."""
    entries = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and _is_count(entry.get("step")) and "stage" in entry:
                earlier = {} if "format" in entry else {"format": FORMAT, "step": entry["step"] + 1}
                entries.append(entry | earlier)
    return entries


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53
