"""The members of a sample that are its image and its label."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from iccld.data.images.decode import IMAGE_EXTENSIONS
from iccld.data.shards.tally import Tally, plain
from iccld.data.shards.tars import LEAVE_OUT, Fault, Place, Problem, Unusable, key_fault
from iccld.data.storage.reader import MAX_SAMPLE_BYTES

_MAX_NAMED = 4


@dataclass(frozen=True)
class Roles:
    """Extensions of image and label, as the user names them. For images, "" is any image's; for labels, none."""

    path: Path
    image_extension: str
    label_extension: str

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Return the extensions that an image may have."""
        if self.image_extension:
            return (self.image_extension,)
        return tuple(extension for extension in IMAGE_EXTENSIONS if extension != self.label_extension)

    def places(self, key: str, fields: Mapping[str, Place | Fault], passed_over: Tally) -> tuple[Place, Place]:
        """Find the image and the label of a sample, a label of size 0 being none; other members are counted.

        Raises Unusable, also if the user must say which member is which.
        """
        if fault := key_fault(key):
            raise self._unusable(key, fault, "rename it")
        found = [extension for extension in self.images if extension in fields]
        has_label = bool(self.label_extension) and self.label_extension in fields
        self._check_image(key, fields, found)
        self._check_label(key, fields, found, has_label)
        image = self._place(key, fields[found[0]])
        label = self._place(key, fields[self.label_extension]) if has_label else Place(0, 0)
        if has_label and not label.size:
            raise self._unusable(key, "its label is empty", "pack it again")
        size = image.size + label.size
        if size > MAX_SAMPLE_BYTES:
            raise self._unusable(key, f"it has {size} bytes, {MAX_SAMPLE_BYTES} at most", "pack smaller images")
        for extension in fields:
            if extension != found[0] and not (has_label and extension == self.label_extension):
                passed_over.add(f"members not used: .{plain(extension)}", f"{self.path.name}: {key}.{extension}")
        return image, label

    def _check_image(self, key: str, fields: Mapping[str, Place | Fault], found: list[str]) -> None:
        if not found:
            what = f"it has no image ({', '.join(self.images)}), only {_named(fields)}"
            raise self._unusable(key, what, f"add one, or name it by --image-extension{self._dots(fields)}")

    def _check_label(self, key: str, fields: Mapping[str, Place | Fault], found: list[str], has_label: bool) -> None:
        """Refuse a sample with several members that may be its label, until the user names one."""
        if self.image_extension:
            return
        pictures = [extension for extension in fields if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
        if has_label or not self.label_extension:
            if len(found) > 1:
                what = f"it has several images, {_named(found)}"
                raise self._unusable(key, what, f"say which is meant, as in --image-extension {found[0]}")
        elif len(pictures) > 1:
            label = next(extension for extension in reversed(pictures) if extension != found[0])
            what = f"it has {_named(pictures)}, and no {self.label_extension}"
            remedy = f"name its label, as in --label-extension {plain(label)}, or its image, or use --no-labels"
            raise self._unusable(key, what, remedy)

    def _place(self, key: str, member: Place | Fault) -> Place:
        if isinstance(member, Fault):
            raise Unusable(Problem(str(self.path), *member, key))
        return member

    def _dots(self, fields: Mapping[str, Place | Fault]) -> str:
        dotted = any(extension.rpartition(".")[2] in IMAGE_EXTENSIONS and "." in extension for extension in fields)
        return " (a key ends at the first dot of a file's name: rename what has more)" if dotted else ""

    def _unusable(self, key: str, what: str, remedy: str) -> Unusable:
        return Unusable(Problem(str(self.path), what, f"{remedy}, {LEAVE_OUT}", key))


def _named(extensions: Mapping[str, Place | Fault] | list[str]) -> str:
    names = sorted(map(plain, extensions))
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
