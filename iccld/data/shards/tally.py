"""Counts of what is passed over, so that nothing is lost in silence."""

from collections.abc import Iterable
from dataclasses import dataclass, field

_MAX_KINDS = 12


def plain(text: str) -> str:
    """A name of a file or a member as one printable line, whatever it holds."""
    return text if text.isprintable() else ascii(text)[1:-1]


@dataclass
class Tally:
    """How many there are of each kind, and the first of them. A kind reads on from its number."""

    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Counts `count` more of a kind; what comes after 12 kinds is one kind."""
        if kind not in self.kinds and len(self.kinds) >= _MAX_KINDS:
            kind = "others"
        before, first = self.kinds.get(kind, (0, example))
        self.kinds[kind] = before + count, first

    def update(self, others: Iterable["Tally"]) -> "Tally":
        """Adds what others have counted."""
        for other in others:
            for kind, (count, example) in other.kinds.items():
                self.add(kind, example, count)
        return self

    def lines(self) -> list[str]:
        """Says each kind in a line."""
        return [f"{count:,} {kind}, such as {plain(first)}" for kind, (count, first) in self.kinds.items()]
