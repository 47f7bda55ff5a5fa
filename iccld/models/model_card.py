"""config.json of a saved model: what is needed to rebuild and to use it, as plain JSON, read strictly."""

import contextlib
import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from iccld import schema
from iccld.durable import write_whole
from iccld.reading import read_limited
from iccld.texts import short

T = TypeVar("T")

PATHS = ("run_dir", "checkpoint")
"""The entries of an origin that are paths."""

FORMAT_VERSION = 2
READABLE = (1, 2)  # 1: without the weights' checksum
CARD_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MAX_BYTES = 4 << 20
MAX_NUMBER = 1 << 17
MAX_COUNT = 256
"""The most layers of a kind: anyone may write a card, and its model is built before it is compared with weights."""
_COUNTS = re.compile(r"(layers|depths?|blocks|levels|stages|tokens|repeats)$|channel_multipliers$")
MAX_FACTOR = 16
"""The most that layers or widths are multiplied by."""
_FACTORS = re.compile(r"(coefficient|multiplier)$")


class ModelStage(Enum):
    """Stages of a model's training: E and D only, or the denoiser too."""

    segmentation = "segmentation"
    adversarial = "adversarial"

    @property
    def has_denoiser(self) -> bool:
        """Tell whether the denoiser is trained, and so worth saving and asking."""
        return self is ModelStage.adversarial


@dataclass(frozen=True)
class ModelCard:
    """Content of config.json. `model` is a `ModelConfig` as plain values; `origin` says where the weights come from.

    `weights_sha256` is of the file beside the card; empty in format 1, which has none. `deterministic`: see `ICCLD`.
    """

    format_version: int
    stage: ModelStage
    class_names: list[str]
    palette: list[list[int]]
    model: dict[str, Any]
    origin: dict[str, Any]
    weights_sha256: str = field(default="", metadata={"of_training": True})
    deterministic: bool = field(default=False, metadata={"when_absent": False})

    def __post_init__(self) -> None:
        names, colours = self.class_names, self.palette
        if not names or len(names) != len(colours) or any(len(colour) != 3 for colour in colours):
            raise ValueError(
                f"model card: {len(names)} class_names and {len(colours)} palette entries; "
                f"every class needs a name and an (R, G, B) colour."
            )
        if len(names) > 255 or any(not name.isprintable() or len(name) > 100 for name in names):
            raise ValueError("model card: class_names must be at most 255 plain names, of at most 100 letters each.")
        if any(not 0 <= part <= 255 for colour in colours for part in colour):
            raise ValueError("model card: palette must hold numbers from 0 to 255.")
        if not re.fullmatch(r"[0-9a-f]{64}" if self.format_version > 1 else "", self.weights_sha256):
            raise ValueError(
                f"model card: weights_sha256={self.weights_sha256[:80]!r} does not belong to format_version="
                f"{self.format_version}; format 2 has the SHA-256 of {WEIGHTS_NAME}, format 1 has none."
            )


def read_card(folder: Path) -> ModelCard:
    """Read the card of a saved model. Every defect is a ValueError with the file's name."""
    path = folder / CARD_NAME
    for needed in (path, folder / WEIGHTS_NAME):
        if not needed.is_file():
            raise ValueError(
                f"{needed} is missing; {folder} is not a whole saved model. Give a folder that save_pretrained wrote "
                f"({WEIGHTS_NAME} and {CARD_NAME})."
            )
    values = _read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one JSON object; export the model again.")
    if values.get("format_version") not in READABLE:
        raise ValueError(
            f"{path}: format_version={short(values.get('format_version'))}, this version of iccld reads 1 and 2; "
            f"use the iccld that wrote the model, or export it again."
        )
    card = build(ModelCard, values, where=str(path))
    check_sizes(card.model, where=str(path))
    return card


def _read_json(path: Path) -> Any:
    data = read_limited(path, MAX_BYTES)
    try:
        return json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); export the model again.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands there twice")
    return values


def check_sizes(value: Any, *, where: str, name: str = "") -> None:
    """Refuse numbers that no model has, before anything is built of them. Raises ValueError."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_sizes(item, where=f"{where}: {key}", name=key)
    elif isinstance(value, list):
        for item in value:
            check_sizes(item, where=where)
    numbers = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int | float)]
    if not all(abs(number) <= MAX_NUMBER for number in numbers):  # nan is not either
        raise ValueError(f"{where}={str(numbers)[:60]} must be numbers of at most {MAX_NUMBER}; no model has these.")
    if _FACTORS.search(name) and any(abs(number) > MAX_FACTOR for number in numbers):
        raise ValueError(f"{where}={str(numbers)[:60]} must be at most {MAX_FACTOR}; this is no card of a model.")
    if _COUNTS.search(name) and (sum(numbers) > MAX_COUNT or len(numbers) > 64):
        raise ValueError(f"{where}={str(numbers)[:60]} must be at most {MAX_COUNT} in all; this is no card of a model.")


def without_paths(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return where weights come from without paths of this machine: of each path its last name."""
    return {key: _without_path(key, value) for key, value in origin.items()}


def _without_path(key: str, value: Any) -> Any:
    if not isinstance(value, str) or not value:
        return value
    is_there = False
    with contextlib.suppress(OSError, ValueError):  # what a stranger wrote need not be a path
        is_there = Path(value).exists()
    is_path = key in PATHS or is_there or value.startswith(("/", "~", ".", "file:"))
    return Path(value).name if is_path else value


def write_card(folder: Path, card: ModelCard) -> None:
    """Write config.json, whole or not at all."""
    write_whole(folder / CARD_NAME, json.dumps(to_plain(card), indent=2, sort_keys=True) + "\n")


def to_plain(value: Any) -> Any:
    """Turn dataclasses, Enums and containers into JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    return value


def build(cls: type[T], values: dict[str, Any], *, where: str) -> T:
    """Rebuild the dataclass that `to_plain` took. Unknown or missing keys and wrong types raise ValueError.

    The error names `where`. A field may be missing if its metadata say `of_training` (no part of what is described) or
    `when_absent` (earlier versions wrote none, and meant this value).
    """
    known = typing.get_type_hints(cls)
    fields: dict[str, Any] = {f.name: known[f.name] for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    wrong = {f"unknown {key}" for key in values.keys() - fields.keys()}
    values = schema.values_when_absent(cls) | values
    needed = {f.name for f in dataclasses.fields(cls) if "of_training" not in f.metadata}  # pyright: ignore[reportArgumentType]
    wrong |= {f"missing {key}" for key in needed - values.keys()}
    if wrong:
        raise ValueError(
            f"{where}: {cls.__name__} has {', '.join(sorted(wrong))}; the file was edited, or written by another "
            f"version of iccld. Export the model again with this version."
        )
    given = {name: hint for name, hint in fields.items() if name in values}
    parsed = {name: _parse(hint, values[name], where=f"{where}: {name}") for name, hint in given.items()}
    try:
        return cls(**parsed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _parse(hint: Any, value: Any, *, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where}={short(value)} must be a JSON object.")
        return build(hint, value, where=where)  # pyright: ignore[reportArgumentType, reportReturnType]
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            raise ValueError(f"{where}={short(value)} must be one of {[member.value for member in hint]}.") from None
    if isinstance(hint, types.UnionType):
        if type(value) not in typing.get_args(hint):
            raise ValueError(f"{where}={short(value)} must be of type {hint}.")
        return value
    expected: Any = typing.get_origin(hint) or hint
    if expected is Any:
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where}={short(value)} must be of type {expected.__name__}.")
    if expected is list and isinstance(value, list):
        (of_item,) = typing.get_args(hint)
        return [_parse(of_item, item, where=f"{where}[{number}]") for number, item in enumerate(value)]
    return value
