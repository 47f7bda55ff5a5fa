"""Removal of secrets from everything that leaves memory: a run's files, messages, job scripts.

A URL keeps its scheme, host and path, and loses user, password, query and fragment. A storage's options keep their
names and lose their values.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
OPTIONS = "options"
"""The key, in any settings, below which every value is a secret."""
MIN_LENGTH = 4
"""Shorter pieces of a setting are not searched for in messages: they would blank out ordinary words."""
# Each reads a text of any length in a time that grows with the length alone: `++` and bounds leave no way back.
_URL = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]{1,30}+:/+[^\s"'<>]+""")
"""Pattern of a URL, also with slashes missing: what was meant as one is treated as one."""
_UP_TO_HOST = re.compile(r"""[^\s@"']++(@(?=[\w\[]))?+""")
_LOGIN = re.compile(r"(?:^|=|[/:]\w*+[^\w/:=])([^/:=]++:.)", re.DOTALL)
_HOST = re.compile(r"(\[[^\[\]@]*\]|[^\s:@\[\]]*+)(:\d*)?\W*")
_GIVEN_OPTION = re.compile(
    r"""(storage(?:[^\n]{0,40}?|\\?["']?[ ]?[=:][ ]?\{(?:(?!storage)[^\n])*?)"""
    r"""\boptions[\w.\[\]-]{0,80}+\\?["']?\s*+[=:]\s*+)"""
    r"""(\{[^}]*\}?|"[^"]*"?|'[^']*'?|\S+)"""
)
"""Pattern of options that stand close behind `storage`, or within its braces, as far as that line goes."""
_ABOVE_OPTIONS = re.compile(r"[+~]*data(\.storage)?=.*\boptions\b", re.DOTALL)
"""Pattern of a `key=value` whose value holds the options, among other settings."""
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|SIGNATURE|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)


def without_secrets(location: str) -> str:
    """Return a location without user, password, query and fragment; a folder is returned unchanged."""
    return _bare(location) if is_url(location) else redact(location)


def is_url(location: str) -> bool:
    """Tell whether a location names a scheme; `file://` URLs are folders."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location)
    return scheme is not None and scheme[1].lower() != "file"


def redact(text: str, given: Iterable[str] = ()) -> str:
    """Return a message without the secrets of the URLs and options in it, and of the settings `given`."""
    for piece in sorted({piece for word in given for piece in secrets_in(word)}, key=len, reverse=True):
        text = text.replace(piece, HIDDEN)
    text = _URL.sub(lambda found: found[0] if found[0].lower().startswith("file:") else _bare(found[0]), text)
    text = _UP_TO_HOST.sub(_without_login, text)
    return _GIVEN_OPTION.sub(lambda found: found[1] + HIDDEN, text)


def redacted(settings: Any) -> Any:
    """Return plain settings (mappings, lists, texts, numbers) as they may be saved."""
    if isinstance(settings, Mapping):
        return {
            key: dict.fromkeys(value, HIDDEN) if key == OPTIONS and isinstance(value, Mapping) else redacted(value)
            for key, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [redacted(value) for value in settings]
    return without_secrets(settings) if isinstance(settings, str) and _URL.search(settings) else settings


def holds_secret(word: str) -> bool:
    """Tell whether a `key=value` must not be shown or written where others read it."""
    value = word.partition("=")[2]
    return _ABOVE_OPTIONS.match(word) is not None or redact(word) != word or without_secrets(value) != value


def secrets_in(word: str) -> set[str]:
    """Return the pieces of a location or a `key=value` that must not appear anywhere, as given and decoded."""
    pieces: set[str] = set()
    whole = word if is_url(word) else word.partition("=")[2]
    for url in [whole, *_URL.findall(word)] if _URL.search(word) else []:
        (_, rest), (_, bare) = _divided(url), _divided(_bare(url))
        user, _, password = rest.rpartition("@" + bare.partition("/")[0])[0].partition(":")
        pieces |= {password or user}
        pieces |= {value.partition("=")[2] or value for value in re.split(r"[&?#]", url)[1:]}
    if _ABOVE_OPTIONS.match(word) or _GIVEN_OPTION.search(word):
        value = word.partition("=")[2]
        pieces |= set(re.findall(r"[^\s{}\[\],:\"']+", value)) | {value}
    pieces |= {unquote(piece) for piece in pieces}
    pieces |= {repr(piece)[1:-1] for piece in pieces}
    return {piece for piece in pieces if len(piece) >= MIN_LENGTH and piece not in ("true", "false")}


def secrets_of_environment() -> list[str]:
    """Return the values of variables whose names say that they are secret."""
    return [value for name, value in os.environ.items() if len(value) >= 2 * MIN_LENGTH and _SECRET_NAME.search(name)]


def without_known(text: str, secrets: Iterable[str]) -> str:
    """Return a message without these secrets, those of the environment, and those of any URL in it."""
    for piece in sorted({*secrets, *secrets_of_environment()}, key=len, reverse=True):
        if len(piece) >= MIN_LENGTH and piece not in ("true", "false"):
            text = text.replace(piece, HIDDEN)
    return redact(text)


def _without_login(found: re.Match[str]) -> str:
    """Hide `user:password` before a host; a match that ends at no host stays unchanged."""
    login = _LOGIN.search(found[0][:-1]) if found[1] else None
    return f"{found[0][: login.start(1)]}{HIDDEN}@" if login else found[0]


def _bare(url: str) -> str:
    scheme, rest = _divided(url)
    host = rest.partition("/")[0]
    host = re.split(r"[?#]", host, maxsplit=1)[0]
    if "@" in host:
        rest = rest[len(host.rpartition("@")[0]) + 1 :]
    elif "@" in rest and not _HOST.fullmatch(host):  # a password in which / ? or # was not encoded
        rest = rest.rpartition("@")[2]
    return scheme + re.split(r"[?#]", rest, maxsplit=1)[0]


def _divided(url: str) -> tuple[str, str]:
    """Divide a location into the scheme, with its colon and slashes, and the rest."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*:/+)?(.*)", url, re.DOTALL)
    assert found is not None
    return found[1] or "", found[2]
