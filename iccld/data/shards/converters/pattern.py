"""Path patterns such as `gt/{split}/{city}/{frame}_gt.png`: matched against paths, and filled in to make them.

`{name}` stands for a path component or a part of one, `{name*}` for one or several components, and `{suffix}` for the
ending of an image file of a format that is read.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from iccld.data.images.decode import IMAGE_EXTENSIONS

_OTHER_IMAGES = {
    *("tif", "tiff", "bmp", "gif", "jfif", "jpe", "jp2", "j2k", "jxl", "heic", "heif", "avif", "ppm", "pgm", "pnm"),
    *("exr", "hdr", "tga", "dng", "raw", "nef", "cr2", "arw"),
}
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)(\*?)\}")
_SPLIT_FOLDER = re.compile(r"(?<![^/])\{split\}/")


def is_readable(path: str) -> bool:
    """Tell whether a file is an image of a format that is read, by its name."""
    return path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def has_image_ending(path: str) -> bool:
    """Tell whether a file is an image by its name, of a format that is read, or of any other."""
    return is_readable(path) or path.rpartition(".")[2].lower() in _OTHER_IMAGES


@dataclass(frozen=True)
class Pattern:
    """Pattern of '/'-separated paths."""

    text: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the placeholders, in order."""
        return tuple(dict.fromkeys(match[1] for match in _PLACEHOLDER.finditer(self.text)))

    @property
    def folder(self) -> str:
        """Return the folder that holds all matches: the components before the first placeholder."""
        return self.text.partition("{")[0].rpartition("/")[0]

    @property
    def top(self) -> str:
        """Return the first component, or "" if it is not fixed."""
        first = self.text.split("/")[0]
        return "" if "{" in first else first

    def is_sound(self) -> bool:
        """Tell whether it is a relative path within its root, and every brace belongs to a placeholder.

        Something stands between two placeholders, and two at most have a `*`: else matching a path takes for ever.
        """
        components = _PLACEHOLDER.sub("x", self.text).split("/")
        is_quick = "}{" not in self.text and self.text.count("*}") <= 2
        return is_quick and all(c and not c.startswith(".") and not set(c) & set("{}\\*") for c in components)

    def with_split(self, split: str) -> "Pattern":
        """Return the pattern with `{split}` replaced; without a split, that folder is left out."""
        return Pattern(self.text.replace("{split}", split) if split else _SPLIT_FOLDER.sub("", self.text))

    def match(self, path: str) -> dict[str, str] | None:
        """Return what the placeholders stand for in `path`, or None. The case of all other letters is ignored."""
        found = self._regex.fullmatch(path if path.isascii() else unicodedata.normalize("NFC", path))
        return found and found.groupdict()

    def matches_but_for_ending(self, path: str) -> bool:
        """Tell whether `path` would match if it had another ending."""
        return self._with_any_ending.match(path) is not None

    @cached_property
    def _with_any_ending(self) -> "Pattern":
        return Pattern(f"{self.text.rpartition('.')[0]}.{{any_ending}}")

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the path in which the placeholders stand for `values`."""
        return _PLACEHOLDER.sub(lambda placeholder: values[placeholder[1]], self.text)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        regex, end, seen = "", 0, set[str]()
        for placeholder in _PLACEHOLDER.finditer(self.text):
            name, several = placeholder.groups()
            body = f"(?:{'|'.join(IMAGE_EXTENSIONS)})" if name == "suffix" else ".+" if several else "[^/]+"
            regex += re.escape(self.text[end : placeholder.start()])
            regex += f"(?P={name})" if name in seen else f"(?P<{name}>{body})"
            seen.add(name)
            end = placeholder.end()
        return re.compile(regex + re.escape(self.text[end:]), re.IGNORECASE)
