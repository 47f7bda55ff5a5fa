"""Pairing of each image with its label."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from iccld.data.shards.converters.tree import fold
from iccld.data.shards.tally import plain


@dataclass(frozen=True)
class Pair:
    """Image and the path of its label, whether that file exists or not; None if the set has no labels.

    Paths are those of the input tree.
    """

    key: str
    image: str
    label: str | None


def without_labels(pairs: Sequence[Pair], *, own_too: bool) -> list[Pair]:
    """Leave out the images that are labels of others: in one folder, names of labels may fit those of images, too.

    `own_too`: also those that would be their own labels, since the image of such a label is missing.
    """
    labels = {fold(pair.label) for pair in pairs if pair.label and (own_too or fold(pair.label) != fold(pair.image))}
    return [pair for pair in pairs if fold(pair.image) not in labels]


def pair_labels(pairs: Sequence[Pair], files: Sequence[str]) -> list[Pair]:
    """Give each pair the file of its label: by its exact name, or else ignoring case and the form of accents.

    Raises ValueError if two files fit.
    """
    there = set(files)
    taken = there & {pair.label for pair in pairs}
    lacking = [pair for pair in pairs if pair.label and pair.label not in there]
    if not lacking:
        return list(pairs)
    free, wanting = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for path in files:
        if path not in taken:
            free[fold(path)].append(path)
    for pair in lacking:
        wanting[fold(pair.label or "")].append(pair.image)
    found = dict[str, str]()
    for name, images in wanting.items():
        if len(labels := free.get(name, [])) > 1 or (labels and len(images) > 1):
            names = ", ".join(map(plain, [*images, *labels]))
            raise ValueError(f"{names}: it is not clear which label is which image's; rename them alike.")
        found.update(dict.fromkeys(images, labels[0]) if labels else {})
    return [replace(pair, label=found.get(pair.image, pair.label)) for pair in pairs]


def repeated(pairs: Sequence[Pair], real: Mapping[str, str]) -> list[Pair]:
    """Return the pairs whose image is that of another one, by its `real` name, with the same label or without one.

    Of such pairs, the one that lies in its own place is not returned.
    """
    named = [(real.get(pair.image, pair.image), real.get(pair.label or ""), pair) for pair in pairs]
    images, seen, found = set[str](), set[tuple[str, str | None]](), list[Pair]()
    for image, label, pair in sorted(named, key=lambda n: (n[1] is None, not n[0].endswith(f"/{n[2].image}"))):
        if (image, label) in seen or (label is None and image in images):
            found.append(pair)
        images.add(image)
        seen.add((image, label))
    return found
