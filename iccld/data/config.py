"""The data section of an experiment's configuration, and how a global batch is divided among ranks."""

from dataclasses import dataclass, field

from iccld.data.domain import STRIDE
from iccld.data.index import ShardIndex
from iccld.labels import CITYSCAPES_19, ClassSet, merged_class_set


@dataclass
class DatasetConfig:
    """A set by its folder of shards with their index; an empty `shards` means that there is none."""

    name: str = ""
    shards: str = ""


@dataclass
class ClassSetConfig:
    """Optional merging or dropping of the 19 classes; empty means the 19. See `labels.merged_class_set`."""

    names: list[str] = field(default_factory=list)
    of_train_id: dict[int, int] = field(default_factory=dict)

    def build(self) -> ClassSet:
        if not self.names and not self.of_train_id:
            return CITYSCAPES_19
        return merged_class_set(self.names, self.of_train_id)


@dataclass
class DataConfig:
    """What is read and how it is cropped; the margins are fractions of the height without pseudo-labels."""

    source: DatasetConfig = field(default_factory=DatasetConfig)
    target: DatasetConfig = field(default_factory=DatasetConfig)
    validation: DatasetConfig = field(default_factory=DatasetConfig)
    crop_size: list[int] = field(default_factory=lambda: [512, 512])
    num_workers: int = 2
    rare_class_sampling: bool = True
    rare_class_temperature: float = 0.01
    rare_class_min_pixels: int = 3000
    max_class_share: float = 0.75
    flip: float = 0.5
    target_margin_top: float = 0.0
    target_margin_bottom: float = 0.0
    class_set: ClassSetConfig = field(default_factory=ClassSetConfig)

    def __post_init__(self) -> None:
        _check_crop_size(self.crop_size)
        _check("num_workers", self.num_workers, self.num_workers >= 0, "at least 0; 2 is usual")
        temperature = self.rare_class_temperature
        _check("rare_class_temperature", temperature, temperature > 0, "positive; 0.01 is usual")
        _check("rare_class_min_pixels", self.rare_class_min_pixels, self.rare_class_min_pixels >= 0, "at least 0")
        _check("max_class_share", self.max_class_share, 0 < self.max_class_share <= 1, "in (0, 1]; 1 turns it off")
        _check("flip", self.flip, 0 <= self.flip <= 1, "a probability; 0.5 is usual")
        margins = (self.target_margin_top, self.target_margin_bottom)
        if min(margins) < 0 or sum(margins) >= 1:
            raise ValueError(
                f"data.target_margin_top={margins[0]} and data.target_margin_bottom={margins[1]} must be fractions of "
                f"the image's height that leave something between them, as 0.03 and 0.24 do."
            )
        self.class_set.build()


def _check(name: str, value: float, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"data.{name}={value} must be {rule}.")


def _check_crop_size(crop_size: list[int]) -> None:
    if len(crop_size) == 2 and all(side > 0 and side % STRIDE == 0 for side in crop_size):
        return
    near = [max(STRIDE, round(side / STRIDE) * STRIDE) for side in crop_size[:2]]
    raise ValueError(
        f"data.crop_size={list(crop_size)} must be [height, width], multiples of {STRIDE} (latent stride); "
        f"use {near if len(near) == 2 else [512, 512]}."
    )


def open_dataset(config: DatasetConfig, role: str, *, with_labels: bool) -> ShardIndex:
    """Opens the index of the `role` ("source", "target" or "validation") set and checks that it has what is needed."""
    setting = f"data.{role}.shards"
    if not config.shards:
        raise ValueError(f"{setting} is empty, but a {role} set is needed; set it to a folder of shards.")
    index = ShardIndex.open(config.shards, setting=setting)
    if with_labels and not index.header.has_labels:
        raise ValueError(
            f"{setting}={config.shards} has no labels, but the labels of the {role} set are needed; make the shards "
            f"without --no-labels."
        )
    return index


@dataclass(frozen=True)
class BatchLayout:
    """How the global batch of a step is divided; what each sample number means does not depend on it."""

    global_batch_size: int
    micro_batch_size: int
    num_accumulation: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        parts = self.micro_batch_size * self.num_accumulation * self.world_size
        if self.global_batch_size < 1 or self.global_batch_size != parts:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be micro_batch_size={self.micro_batch_size} x "
                f"num_accumulation={self.num_accumulation} x world_size={self.world_size} = {parts}; change the "
                f"micro-batch or the accumulation, and leave the global batch, which belongs to the experiment."
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be in 0-{self.world_size - 1}; world_size is {self.world_size}.")

    def numbers(self, step: int, accumulation: int) -> range:
        """The sample numbers, of each stream, of one micro-batch of this rank."""
        start = step * self.global_batch_size
        start += (accumulation * self.world_size + self.rank) * self.micro_batch_size
        return range(start, start + self.micro_batch_size)
