"""Tiny random data sets in the layouts that converters read, and shards of them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iccld.batch_layout import BatchLayout
from iccld.data.config import DataConfig, DatasetConfig
from iccld.data.shards.indexing import IndexResult
from iccld.data.shards.making import MakeShardsConfig, make_shards
from iccld.data.shards.packing import ImageFormat
from iccld.data.storage.index import ARRAY_FILES, HEADER_FILE, ShardIndex, file_crc32, write_index
from iccld.data.storage.integrity import Totals
from iccld.labels import CITYSCAPES_IDS

HEIGHT, WIDTH = 24, 32
CROP = (16, 24)
GLOBAL_BATCH_SIZE = 8


def random_pair(seed: int, *, height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """An image of noise and train ids in blocks of 4 pixels, some of them 255."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    choices = np.append(generator.integers(0, 19, 4), 255).astype(np.uint8)
    blocks = generator.choice(choices, (-(-height // 4), -(-width // 4)))
    return image, blocks.repeat(4, 0).repeat(4, 1)[:height, :width]


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def pair_members(key: str, seed: int) -> dict[str, bytes]:
    """The members of the tar sample `key`: its image and its label."""
    image, train_ids = random_pair(seed)
    return {f"{key}.png": png(image), f"{key}.label.png": png(train_ids)}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def to_ids(train_ids: np.ndarray) -> np.ndarray:
    """Train ids to Cityscapes label ids; what is ignored becomes 0 (unlabeled)."""
    table = np.zeros(256, np.uint8)
    table[: len(CITYSCAPES_IDS)] = CITYSCAPES_IDS
    return table[train_ids]


def write_folder(root: Path, count: int, *, labels: bool = True, suffix: str = ".png") -> Path:
    for i in range(count):
        image, train_ids = random_pair(i)
        save(root / "images" / f"frame_{i:03d}{suffix}", image)
        if labels:
            save(root / "labels" / f"frame_{i:03d}.png", train_ids)
    return root


def write_gta5(root: Path, count: int) -> Path:
    for i in range(count):
        image, train_ids = random_pair(i)
        save(root / "images" / f"{i:05d}.png", image)
        palettised = Image.fromarray(to_ids(train_ids), mode="P")
        palettised.putpalette([value * 7 % 256 for value in range(768)])
        (root / "labels").mkdir(parents=True, exist_ok=True)
        palettised.save(root / "labels" / f"{i:05d}.png")
    return root


def write_cityscapes(root: Path, split: str, count: int, *, labels: bool = True) -> Path:
    for i in range(count):
        image, train_ids = random_pair(i)
        city, name = f"city{i % 2}", f"city{i % 2}_{i:06d}_000019"
        save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
        if labels:
            save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", to_ids(train_ids))
            save(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", to_ids(train_ids))
    return root


def make_set(folder: Path, count: int, *, labels: bool = True, samples_per_shard: int = 4) -> ShardIndex:
    """Lossless shards of the first `count` random pairs, in `folder`/shards."""
    config = MakeShardsConfig(
        dataset="folder",
        classes="cityscapes",
        input=str(write_folder(folder / "raw", count, labels=labels)),
        output=str(folder / "shards"),
        no_labels=not labels,
        image_format=ImageFormat.PNG,
        samples_per_shard=samples_per_shard,
    )
    return opened(make_shards(config, progress=lambda line: None))


def opened(result: IndexResult) -> ShardIndex:
    """The index of a result, which has one."""
    assert result.index is not None, "\n".join(map(str, result.problems))
    return result.index


def seal(folder: Path) -> None:
    """Makes the header of an index say what its arrays hold, as whoever changes both would."""
    header, totals = json.loads((folder / HEADER_FILE).read_text()), Totals()
    totals.add(np.load(folder / "samples.npy"))
    header["checksums"] = {name: file_crc32(folder / name) for name in ARRAY_FILES}
    for name, total in vars(totals).items():
        header[name] = total.tolist() if isinstance(total, np.ndarray) else total
    (folder / HEADER_FILE).write_text(json.dumps(header))


def write_index_anew(folder: Path, **content: Any) -> None:
    """Write the files of an index in place of those that are there; see `write_index`."""
    for name in (*ARRAY_FILES, HEADER_FILE):
        (folder / name).unlink()
    write_index(folder, dataset="", **content)


def members(index: ShardIndex, position: int) -> tuple[bytes, bytes]:
    """The bytes that the index points at."""
    record = index.samples[position]
    data = (Path(index.location) / index.shard_name(int(record["shard"]))).read_bytes()
    places = [(int(record[f"{kind}_offset"]), int(record[f"{kind}_size"])) for kind in ("image", "label")]
    image, label = (data[offset : offset + size] for offset, size in places)
    return image, label


def config(folders: dict[str, str], **settings: Any) -> DataConfig:
    """A data section over the sets of the `folders` fixture, without workers."""
    defaults = {
        "source": DatasetConfig("s", folders["source"]),
        "target": DatasetConfig("t", folders.get("target", "")),
        "validation": DatasetConfig("v", folders["source"]),
        "crop_size": list(CROP),
        "num_workers": 0,
        "rare_class_min_pixels": 40,
    }
    return DataConfig(**defaults | settings)


def layout(world_size: int = 1, rank: int = 0, num_accumulation: int = 1) -> BatchLayout:
    micro = GLOBAL_BATCH_SIZE // world_size // num_accumulation
    return BatchLayout(GLOBAL_BATCH_SIZE, micro, world_size=world_size, rank=rank)
