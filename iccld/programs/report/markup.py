"""HTML and SVG as text; only markup that is made here is interpreted."""

from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """Text that is markup already; all other text is escaped when it is put in."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """Make an element; `class_` and `stroke_width` become `class` and `stroke-width`; None leaves an attribute out."""
    words = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    return Markup(f"<{name}{''.join(words)}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """Join parts one after the other."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, class_: str = "") -> Markup:
    """Make a table that scrolls by itself if it is too wide; the first cell of a row is its head."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", tag("thead", top), tag("tbody", *body), class_=class_ or None), class_="scroll")


def swatch(colour: str) -> Markup:
    """Make a small square of a colour, as in `#804080`."""
    return tag("span", class_="swatch", style=f"background:{colour}")


def section(title: str, *children: str, about: str = "") -> Markup:
    """Make a part of the page with a heading and an anchor; nothing if there is nothing in it."""
    if not any(children):
        return Markup("")
    lead = [tag("p", about, class_="about")] if about else []
    return tag("section", tag("h2", title), *lead, *children, id=title.lower().replace(" ", "-"))
