"""The data section of an experiment's configuration."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from iccld.data.classes import read_classes
from iccld.data.storage.base import StorageConfig, is_remote
from iccld.data.storage.cache import CacheConfig
from iccld.labels import CITYSCAPES_19, ClassSet, merged_class_set, own_class_set
from iccld.ranges import Range, at_least, between, check_ranges, share
from iccld.redact import without_secrets
from iccld.strides import LATENT_STRIDE

_UNASKED = "unasked:"
"""Mark before a location that a saved file names, until the command line has replaced it."""

OnError = Enum("OnError", {"raise": "raise", "replace": "replace"})
"""Results of a sample that cannot be used: it ends the run, or gives way to the next one of the order."""


@dataclass
class SetConfig:
    """A set of samples. Of its first `first_percent`, those are used whose keys are in `keys`."""

    name: str = ""  # its name in messages and reports
    shards: str = ""  # folder or URL of the shards with their index; empty: there is no set
    weight: float = 1.0  # its share where a domain has several sets
    first_percent: float = 100.0  # how many of its samples are used, from the first on
    keys: str = ""  # a file with the keys of the samples that are used, one a line; empty: all

    def __post_init__(self) -> None:
        name = without_secrets(self.shards) or "a set"
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight={self.weight} of {name} must be positive; 1 is usual.")
        if not 0 < self.first_percent <= 100:
            raise ValueError(f"first_percent={self.first_percent} of {name} must be in (0, 100]; 100 uses all.")


@dataclass
class DatasetConfig(SetConfig):
    """The sets of a domain: this one, and further ones by name."""

    also: dict[str, SetConfig] = field(default_factory=dict)  # further sets of the domain, by name

    def __post_init__(self) -> None:
        super().__post_init__()
        empty = [name for name, part in self.also.items() if not part.shards]
        if empty or (self.also and not self.shards):
            raise ValueError(
                f"also.{(empty or list(self.also))[0]}: every set of a domain needs its shards, the first one too."
            )


@dataclass
class ClassSetConfig:
    """Optional merging or dropping of the 19 classes; empty means the 19. `data.classes` fills it with one's own."""

    names: list[str] = field(default_factory=list)  # the classes' names
    of_train_id: dict[int, int] = field(default_factory=dict)  # the class that each Cityscapes train id becomes
    colors: list[list[int]] = field(default_factory=list)  # colours of one's own classes, whose ids are their indices
    rare: list[str] = field(default_factory=list)  # those of one's own classes that are drawn as often as the rarest
    things: list[str] = field(default_factory=list)  # those of one's own classes that are countable objects

    def build(self) -> ClassSet:
        if self.colors and self.of_train_id:
            raise ValueError(
                "data.class_set: colors, of classes of one's own, and of_train_id exclude each other; leave one out."
            )
        if self.colors:
            return own_class_set(self.names, self.colors, rare=self.rare, things=self.things)
        if not self.names and not self.of_train_id:
            return CITYSCAPES_19
        return merged_class_set(self.names, self.of_train_id)


@dataclass
class DataConfig:
    """Settings of what is read and how it is cropped. Margins are shares of the height that get no pseudo-labels.

    With `on_error: replace`, too many bad samples end the run: more than `max_bad_share` of those that a rank has drawn
    since it started, or of 1,000 if it has drawn fewer.
    """

    source: DatasetConfig = field(default_factory=DatasetConfig)
    target: DatasetConfig = field(default_factory=DatasetConfig)
    validation: DatasetConfig = field(default_factory=DatasetConfig)
    crop_size: list[int] = field(default_factory=lambda: [512, 512])  # height and width, multiples of 8
    num_workers: int = 2  # loader processes of a rank; 0: the training process loads
    rare_class_sampling: bool = True  # draw a class, rare ones more often, and then a source image that shows it
    rare_class_temperature: float = 0.01  # the lower, the more often rare classes are drawn (DAFormer, eq. 12)
    rare_class_min_pixels: int = 3000
    """An image shows a class if it has more pixels of it than this; a crop must show at least half as many."""
    max_class_share: float = 0.75  # source crops are drawn again while one class fills more of them
    flip: float = 0.5  # chance to mirror a crop
    target_margin_top: float = 0.0  # share of the height at the top without pseudo-labels
    target_margin_bottom: float = 0.0  # share of the height at the bottom without pseudo-labels
    classes: str = ""  # a YAML of one's own classes, as `iccld shards make --classes` takes; the run keeps its content
    class_set: ClassSetConfig = field(default_factory=ClassSetConfig)
    on_error: OnError = OnError["raise"]
    """A sample that cannot be used ends the run, or gives way to the next one of the order."""
    max_bad_share: float = 0.001  # a larger share of bad samples ends the run even with `replace`
    storage: StorageConfig = field(default_factory=StorageConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        _check_crop_size(self.crop_size)
        check_ranges(
            self,
            "data",
            num_workers=at_least(0, "2 is usual"),
            rare_class_temperature=at_least(1e-6, "0.01 is usual"),
            rare_class_min_pixels=at_least(0),
            max_class_share=share("1 turns it off"),
            max_bad_share=Range(lambda value: 0 <= value < 1, "at least 0 and below 1; 0.001 is usual"),
            flip=between(0, 1, "0.5 is usual"),
        )
        margins = (self.target_margin_top, self.target_margin_bottom)
        if not (min(margins) >= 0 and sum(margins) < 1):  # nan is neither
            raise ValueError(
                f"data.target_margin_top={margins[0]} and data.target_margin_bottom={margins[1]} must be fractions of "
                f"the image's height that leave something between them, as 0.03 and 0.24 do."
            )
        self._take_classes()
        self.class_set.build()

    def _take_classes(self) -> None:
        """Replace the file's name by its content: a saved run needs no file, and notices if the classes change."""
        if not self.classes:
            return
        own = ClassSetConfig(**read_classes(self.classes).plain)
        if self.class_set != ClassSetConfig() and (self.class_set.names != own.names or self.class_set.of_train_id):
            raise ValueError(
                f"data.classes={self.classes} and data.class_set ({', '.join(self.class_set.names[:4])}, ...) are "
                f"different classes; leave one out."
            )
        self.class_set, self.classes = own, ""


def of_saved_run(values: Any, *, roles: Sequence[str]) -> Any:
    """Return a saved run's settings without those by which a stranger could do harm; see `refuse_unasked`.

    Storage options, further schemes and the cache's folder are left out, and a set of `roles` on a server is marked: so
    only what the command line says, which is put over these values, is followed. A folder of this machine is read: as
    data, it can do no harm.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("data"), Mapping):
        return values
    data = dict(values["data"])
    for part, names in (("storage", ("options", "allow_schemes")), ("cache", ("folder",))):
        if isinstance(data.get(part), Mapping):
            data[part] = {name: value for name, value in data[part].items() if name not in names}
    return {**values, "data": data | {role: _marked(data[role]) for role in roles if role in data}}


def _marked(dataset: Any) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    marked = dict(dataset)
    if is_remote(location := str(marked.get("shards", ""))):
        marked["shards"] = f"{_UNASKED}{location}"
    if isinstance(also := marked.get("also"), Mapping):
        marked["also"] = {name: _marked(part) for name, part in also.items()}
    return marked


def refuse_unasked(config: DataConfig, *, roles: Sequence[str], where: str) -> None:
    """Raise ValueError for a set on a server that only the saved settings, of the file `where`, name."""
    for key, location in locations(config, roles).items():
        if location.startswith(_UNASKED):
            raise ValueError(
                f"{where} names a set on a server, and who made the file is not known; if you trust it, repeat the "
                f"setting: {key}={without_secrets(location.removeprefix(_UNASKED))} (with what else the server asks "
                f"for: user, signature, data.storage.options)."
            )


def refuse_storage_of_files(given: StorageConfig, typed: StorageConfig) -> None:
    """Raise ValueError for options and schemes that the user has not typed: by some, opening a set writes files."""
    schemes = [scheme for scheme in given.allow_schemes if scheme not in typed.allow_schemes]
    options = [name for name, value in given.options.items() if typed.options.get(name) != value]
    if schemes or options:
        key, names = ("allow_schemes", schemes) if schemes else ("options", options)
        raise ValueError(
            f"data.storage.{key}, of which a file sets {', '.join(names)}, counts only as a word of `train` and its "
            f"like, or of --secrets; leave it out of the file, and give it there if you trust it."
        )


def locations(config: DataConfig, roles: Sequence[str], *, with_keys: bool = False) -> dict[str, str]:
    """Return the locations of the roles' sets, by setting; `with_keys` adds the files that choose their samples."""
    found = {}
    for role in roles:
        dataset: DatasetConfig = getattr(config, role)
        sets: dict[str, SetConfig] = {"": dataset} | {f".also.{name}": part for name, part in dataset.also.items()}
        for name, part in sets.items():
            found |= {f"data.{role}{name}.shards": part.shards} if part.shards else {}
            found |= {f"data.{role}{name}.keys": part.keys} if part.keys and with_keys else {}
    return found


def _check_crop_size(crop_size: list[int]) -> None:
    if len(crop_size) == 2 and all(side > 0 and side % LATENT_STRIDE == 0 for side in crop_size):
        return
    near = [max(LATENT_STRIDE, round(side / LATENT_STRIDE) * LATENT_STRIDE) for side in crop_size[:2]]
    raise ValueError(
        f"data.crop_size={list(crop_size)} must be [height, width], multiples of {LATENT_STRIDE} (latent stride); "
        f"use {near if len(near) == 2 else [512, 512]}."
    )
