"""Checks before labels are packed: there are labels, and their meaning is known."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from iccld.data.classes import CITYSCAPES, proposed_yaml
from iccld.data.images.decode import DECODE_ERRORS, decode_label
from iccld.data.shards.converters import Converter, Pair
from iccld.data.shards.converters.readers import color_codes, color_name
from iccld.data.shards.tally import plain
from iccld.labels import MAX_CLASSES

_MAX_LOOKED_AT = 100
_MAX_NAMED = 12
_MANY = 16 * MAX_CLASSES  # values, more than any labels have


class UntoldIdsError(ValueError):
    """Error: nothing says what the labels' ids mean; `yaml` is a file of classes to begin with."""

    def __init__(self, text: str, yaml: str) -> None:
        super().__init__(text)
        self.yaml = yaml


def check_labels(converter: Converter, pairs: Sequence[Pair], setting: str) -> None:
    """Refuse images of which none has a label, and labels whose meaning nothing says. Raises ValueError."""
    if not any(pair.label and converter.tree.exists(pair.label) for pair in pairs):
        polygons = [f"{pair.label.rpartition('.')[0]}.json" for pair in pairs if pair.label]
        if found := next(filter(converter.tree.exists, polygons), ""):
            raise ValueError(
                f"{setting}: its labels are JSON, as {plain(converter.tree.location(found))}; say what their polygons "
                f"mean: --classes FILE.yaml, with labels_as: polygons."
            )
        where = (
            f"expected: {plain(converter.tree.location(pairs[0].label))}" if pairs[0].label else "its layout has none"
        )
        raise ValueError(
            f"{setting}: none of its {len(pairs):,} images has a label ({where}); add --no-labels to this command for "
            f"a target set, or put the labels there."
        )
    if not converter.is_told:
        _refuse_untold(converter, [pair.label for pair in pairs if pair.label], setting)


def _refuse_untold(converter: Converter, labels: Sequence[str], setting: str) -> None:
    shares, kind, count = _shares(converter, labels[:: -(-len(labels) // _MAX_LOOKED_AT)])
    what = "colours" if kind == "colors" else "ids"
    seen = (
        f"{count} of {len(labels):,} label files hold the {what} {_listed(shares)}" if count else "no label can be read"
    )
    again = f"--classes {CITYSCAPES} if they are Cityscapes train ids"
    if not 0 < len(shares) <= MAX_CLASSES:
        remedy = f"more than the {MAX_CLASSES} classes that there may be" if shares else "export them as PNG"
        raise ValueError(f"{setting}: {seen}: {remedy}; is it the folder of labels, and not of instances or depth?")
    raise UntoldIdsError(
        f"{setting}: {seen}, and nothing says what they mean; save the YAML above with names of yours and add "
        f"--classes FILE.yaml, or {again}.",
        proposed_yaml(shares, labels_as=kind),
    )


def _shares(converter: Converter, labels: Sequence[str]) -> tuple[dict[int | str, float], str, int]:
    """Return each id's (or colour's) share of the pixels, how labels are stored, and the number of files read."""
    counts, count, kind = Counter[int | str](), 0, "ids"
    for path in labels:
        try:
            data = converter.tree.read(path)
            found, kind = _values(data, kind)
        except (*DECODE_ERRORS, OSError):  # packing names each bad label
            continue
        count += 1
        counts.update(found)
        if len(counts) > _MANY:  # as in a photo, which has a million colours
            break
    if kind == "colors":
        counts = Counter({key: value for key, value in counts.items() if isinstance(key, str)})
    total = max(sum(counts.values()), 1)
    return {key: value / total for key, value in counts.most_common()}, kind, count


def _values(data: bytes, kind: str) -> tuple[Mapping[int | str, int], str]:
    """Count the pixels of each value of a label: ids, or colours if it or an earlier label has several channels."""
    if kind == "ids":
        try:
            ids, pixels = np.unique(decode_label(data), return_counts=True)
            return dict(zip(ids.tolist(), pixels.tolist(), strict=True)), "ids"
        except ValueError:
            pass
    codes, pixels = np.unique(color_codes(data), return_counts=True)
    return {color_name(code): n for code, n in zip(codes.tolist(), pixels.tolist(), strict=True)}, "colors"


def _listed(shares: Mapping[int | str, float]) -> str:
    named = ", ".join(f"{key} ({share:.1%})" for key, share in list(shares.items())[:_MAX_NAMED])
    return named + (f" and {len(shares) - _MAX_NAMED} more" if len(shares) > _MAX_NAMED else "")
