"""Suggestions "did you mean" for the end of an error's line: a known word that is close to the given one."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from iccld.schema import fields_of, type_at

_CHOICES = (
    re.compile(r"Invalid value '(?P<word>[^']*)', expected one of \[(?P<known>[^\]]*)\]"),  # OmegaConf's, of an Enum
    re.compile(
        r"Could not find '[^']*/(?P<word>[^/']+)'\s+Available options in '[^']*': *(?P<known>[\w ]*)"
    ),  # Hydra's
    re.compile(r"invalid choice: '?(?P<word>[^']*?)'? \(choose from (?P<known>[^)]*)\)"),  # argparse's
)
_KEY = re.compile(r"Key '(?P<word>[^']+)' .*full_key: (?P<key>\S+)", re.DOTALL)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean 'b'?` if a known word is close, else "". `prefix` stands before the known word."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def for_message(message: str, schema: Any = None) -> str:
    """Suggest a word for a message of Hydra, OmegaConf or argparse; `schema` has the settings that it may name."""
    for pattern in _CHOICES:
        if found := pattern.search(message):
            return did_you_mean(found["word"], re.split(r"[,\s]+", found["known"].replace("'", "")))
    if "Unsupported interpolation type" in message:  # OmegaConf's, of a function such as oc.env
        return "; a setting may be the value of another one, as in ${a.b}, and nothing else; write the value itself"
    found = _KEY.search(message) if schema is not None else None
    if found and "is not in struct" in message:  # OmegaConf's, of a mapping whose names are free
        return f"; a + adds a name: +{found['key'].rpartition('.')[0]}={{NAME:VALUE}}"
    return for_key(re.sub(r"\[\w*\]", "", found["key"]), schema) if found else ""


def for_key(key: str, schema: Any) -> str:
    """Suggest a name for the first unknown part of a setting `a.b.c`."""
    parts = key.split(".")
    for number, part in enumerate(parts):
        above = ".".join(parts[:number])
        of_above = type_at(schema, above) if above else schema
        names = fields_of(of_above) if hasattr(of_above, "__dataclass_fields__") else {}
        if names and part not in names:
            return did_you_mean(part, names, f"{above}." if above else "")
    return ""
