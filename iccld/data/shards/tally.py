"""Counts of what is passed over, so that the user learns of everything that is left out."""

from collections.abc import Iterable
from dataclasses import dataclass, field

_MAX_KINDS = 12


def plain(text: str) -> str:
    """Return a name of a file or a member as one printable line."""
    return text if text.isprintable() else ascii(text)[1:-1]


@dataclass
class Tally:
    """Counts of each kind, with the first example of it. The words of a kind follow its number."""

    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count `count` more of a kind; kinds after the twelfth are counted as one."""
        if kind not in self.kinds and len(self.kinds) >= _MAX_KINDS:
            kind = "others"
        before, first = self.kinds.get(kind, (0, example))
        self.kinds[kind] = before + count, first

    def update(self, others: Iterable["Tally"]) -> "Tally":
        """Add what another tally has counted."""
        for other in others:
            for kind, (count, example) in other.kinds.items():
                self.add(kind, example, count)
        return self

    def lines(self) -> list[str]:
        """Describe each kind in a line."""
        return [f"{count:,} {kind}, such as {plain(first)}" for kind, (count, first) in self.kinds.items()]
