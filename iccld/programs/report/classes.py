"""Names and colours of a run's classes: those of its own model cards, else Cityscapes', else by their order."""

import colorsys
from collections.abc import Iterable, Mapping, Sequence

from iccld.labels import CITYSCAPES_NAMES, CITYSCAPES_PALETTE
from iccld.models.model_card import CARD_NAME, MAX_BYTES
from iccld.programs.run.record import Record
from iccld.reading import read_json
from iccld.texts import shown

GOLDEN = 0.618034
"""Share of a turn from hue to hue: neighbours in a list look different, however long it is."""


def class_colours(records: Iterable[Record]) -> dict[str, str]:
    """Return colours as `#rrggbb` by the names of all runs' classes, in the order of the first run that has them."""
    records = list(records)
    found: dict[str, str] = {}
    for record in records:
        for name, colour in _of_cards(record).items():
            found.setdefault(name, colour)
    usual: dict[str, str] = dict(zip(CITYSCAPES_NAMES, map(_hex, CITYSCAPES_PALETTE), strict=True))
    for record in records:
        for scores in record.results.scores.values():
            for name in scores.iou:
                found.setdefault(name, usual.get(name) or _by_order(len(found)))
    return found


def _of_cards(record: Record) -> Mapping[str, str]:
    """Return the classes of the newest readable card. Anyone may have written a card; a wrong one is passed over."""
    for stage in reversed(record.stages):
        for weights in ("teacher", "student"):
            path = record.run_dir / stage / "final" / weights / CARD_NAME
            try:
                card = read_json(path, MAX_BYTES)
                return dict(zip(map(_name, card["class_names"]), map(_hex, card["palette"]), strict=True))
            except (OSError, ValueError, TypeError, KeyError, OverflowError):
                continue
    return {}


def _name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(name)
    return shown(name)[:100]


def _hex(colour: Sequence[int]) -> str:
    red, green, blue = (min(max(int(part), 0), 255) for part in colour)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _by_order(number: int) -> str:
    red, green, blue = colorsys.hls_to_rgb(number * GOLDEN % 1.0, 0.5, 0.6)
    return _hex([round(255 * part) for part in (red, green, blue)])
