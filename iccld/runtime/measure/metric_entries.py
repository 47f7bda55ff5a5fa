"""The lines of metrics.jsonl as entries of the present format; without torch, for those who only look at a run."""

import contextlib
import json
from typing import Any

from iccld.reading import is_count

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
            if isinstance(entry, dict) and is_count(entry.get("step")) and "stage" in entry:
                earlier = {} if "format" in entry else {"format": FORMAT, "step": entry["step"] + 1}
                entries.append(entry | earlier)
    return entries
