"""Ranges of the numbers among the settings: `check_ranges(self, "trainer", num_steps=at_least(1))`.

A section knows the last part of its path; the code that loads the settings puts the rest before it (`iccld.config`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Range of good numbers, and the same in words, with a remedy."""

    holds: Callable[[float], bool]
    rule: str


def check_ranges(config: Any, section: str, **ranges: Range) -> None:
    """Raise ValueError, with setting, value, rule and remedy, for the first attribute outside its range, or NaN."""
    for name, range_ in ranges.items():
        value = getattr(config, name)
        if not range_.holds(value):
            setting = f"{section}.{name}" if section else name
            raise ValueError(f"{setting}={value} must be {range_.rule}.")


def at_least(least: float, remedy: str = "") -> Range:
    """Allow `least` and above, and finite."""
    return _range(lambda value: least <= value < math.inf, f"at least {least:g}", remedy)


def off_or_above() -> Range:
    """Allow 0, which switches something off, and above, and finite."""
    return _range(lambda value: 0 <= value < math.inf, "0 (off) or above, and finite", "")


def above(least: float, remedy: str = "") -> Range:
    """Allow numbers above `least`, and finite."""
    return _range(lambda value: least < value < math.inf, f"above {least:g}, and finite", remedy)


def between(low: float, high: float, remedy: str = "") -> Range:
    """Allow `low` to `high`, both included."""
    return _range(lambda value: low <= value <= high, f"between {low:g} and {high:g}", remedy)


def share(remedy: str = "") -> Range:
    """Allow numbers above 0, and at most 1."""
    return _range(lambda value: 0 < value <= 1, "above 0 and at most 1", remedy)


def _range(holds: Callable[[float], bool], rule: str, remedy: str) -> Range:
    return Range(holds, f"{rule}; {remedy}" if remedy else rule)
