"""The grid: which runs there are, with which settings and seeds. Plain data, each mistake one line.

    baseline: stage1
    seeds: [0, 1, 2]
    common: [experiment=demo, metrics.log_every=10]
    runs:
      source_only: {settings: [stage=source_only]}
      stage1: {initial: source_only, settings: [stage=segmentation]}
      stage2: {after: stage1, settings: [stage=adversarial], about: as in the paper}

`after`: the run takes the finished stage 1 of another run, with the same seed. `initial`: its own stage 1 starts from
the model of that stage 1 (`initial_model`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iccld.plain_yaml import read_yaml
from iccld.redact import holds_secret
from iccld.schema import key_of
from iccld.texts import short

GRID_KEYS = ("baseline", "seeds", "common", "runs")
RUN_KEYS = ("settings", "after", "initial", "about")
OWN_SETTINGS = ("seed", "run_dir", "stage1_from")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_TAKEN = re.compile(r"lock|.*\.(json|md|png)")
_SETTING = re.compile(r"[+~]*[A-Za-z_][^=\s]*=.*", re.DOTALL)
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Row:
    """One run of the grid. `settings` are those of `train`, the common ones first."""

    name: str
    settings: tuple[str, ...]
    after: str = ""
    initial: str = ""
    about: str = ""

    @property
    def needs(self) -> str:
        """Return the row that must be finished before this one; "" for none."""
        return self.after or self.initial


@dataclass(frozen=True)
class Grid:
    """Rows in the order of the file; each is trained with every seed."""

    baseline: str
    seeds: tuple[int, ...]
    rows: Mapping[str, Row]


def read_grid(path: Path) -> Grid:
    """Read the grid in a file. Raises ValueError, in one line, if the user erred; OSError if it is not there."""
    return parse_grid(read_yaml(path, aliases=True), where=str(path))


def parse_grid(values: Any, *, where: str) -> Grid:
    """Build the grid of plain values. Raises ValueError that names `where`, setting, value, rule and remedy."""
    top = _mapping(values, where, known=GRID_KEYS, what="the grid")
    common = _settings(top.get("common", []), f"{where}: common")
    runs = top.get("runs")
    if not isinstance(runs, Mapping) or not runs:
        raise ValueError(f"{where}: runs={short(runs)} must map at least one name to settings; add a run.")
    rows = {name: _row(name, entry, common, where=where) for name, entry in runs.items()}
    baseline = top.get("baseline")
    if not isinstance(baseline, str) or baseline not in rows:
        raise ValueError(
            f"{where}: baseline={short(baseline)} must be a name under runs; use one of {', '.join(rows)}."
        )
    for row in rows.values():
        _check_needs(row, rows, where=where)
    return Grid(baseline, _seeds(top.get("seeds"), where), rows)


def merged(*parts: Iterable[str]) -> list[str]:
    """Join settings in order; a later one replaces an earlier one of the same name, which Hydra refuses for groups."""
    by_key: dict[str, str] = {}
    for word in (word for part in parts for word in part):
        by_key.pop(key_of(word), None)
        by_key[key_of(word)] = word
    return list(by_key.values())


def _row(name: Any, entry: Any, common: list[str], *, where: str) -> Row:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _TAKEN.fullmatch(name) or len(name) > 80:
        raise ValueError(
            f"{where}: runs: {short(name)} names a folder; use at most 80 letters, digits and ._+-, and neither "
            f"`lock` nor the ending of a report (.json, .md, .png)."
        )
    at = f"{where}: runs.{name}"
    given = _mapping(entry, at, known=RUN_KEYS, what="a run")
    texts = {key: given.get(key, "") for key in ("after", "initial", "about")}
    for key, value in texts.items():
        if not isinstance(value, str) or "\n" in value:
            raise ValueError(f"{at}.{key}={short(value)} must be text on one line; put it into quotes.")
    settings = merged(common, _settings(given.get("settings", []), f"{at}.settings"))
    return Row(name, tuple(settings), **texts)


def _settings(value: Any, at: str) -> list[str]:
    """Return each setting as `train` takes it, except what the grid itself decides."""
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"{at}={short(value)} must be a list of key=value texts; use [key=value, ...].")
    for word in value:
        if not _SETTING.fullmatch(word):
            raise ValueError(f"{at}: {word!r} must be key=value, as on the command line of train; correct it.")
        if key_of(word) in OWN_SETTINGS:
            raise ValueError(f"{at}: {word} is set by the grid, for each run (seeds, --output, after); leave it out.")
        if key_of(word) == "initial_model" and word.partition("=")[2] in ("", "''", '""'):
            raise ValueError(f"{at}: {word} names no model; leave it out.")
        if holds_secret(word):
            raise ValueError(
                f"{at}: {key_of(word)} holds a secret, which commands and reports would show; keep it in ~/.netrc or "
                f"~/.aws."
            )
    return list(value)


def _check_needs(row: Row, rows: Mapping[str, Row], *, where: str) -> None:
    at = f"{where}: runs.{row.name}"
    if row.after and row.initial:
        raise ValueError(f"{at} has after={row.after} and initial={row.initial}; `after` trains no stage 1: keep one.")
    if row.initial and any(key_of(word) == "initial_model" for word in row.settings):
        raise ValueError(f"{at} has initial={row.initial} and a setting initial_model; keep one of them.")
    key = "after" if row.after else "initial"
    if row.needs and row.needs not in rows:
        raise ValueError(f"{at}.{key}={row.needs!r} must be a name under runs; use one of {', '.join(rows)}.")
    chain = list(_needed(row, rows))
    if row.name in chain:
        raise ValueError(f"{at}.{key}={row.needs!r} leads back to {row.name}; a run cannot wait for itself.")


def _needed(row: Row, rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield the rows that must be finished before this one, as far as they are known, none twice."""
    seen: set[str] = set()
    name = row.needs
    while name in rows and name not in seen:
        yield name
        seen.add(name)
        name = rows[name].needs


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else []
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= MAX_SEED for seed in numbers)
    if not numbers or not whole or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{where}: seeds={short(value)} must be different whole numbers from 0 to {MAX_SEED}; use [0, 1, 2]."
        )
    return tuple(numbers)


def _mapping(value: Any, at: str, *, known: tuple[str, ...], what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{at}: {short(value)} must be `key: value` lines; {what} has {', '.join(known)}.")
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"{at}: {unknown[0]} is unknown; {what} has {', '.join(known)}.")
    return value
