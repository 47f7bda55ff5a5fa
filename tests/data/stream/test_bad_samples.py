"""A sample that cannot be used is named, or gives way to the next one of the order, on every number of ranks alike."""

import contextlib
import itertools
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iccld.data.config import DataConfig, OnError
from iccld.data.storage.index import ShardIndex
from iccld.data.stream.order import Draw
from iccld.data.stream.stream import TrainingStream
from iccld.data.stream.validation import read_validation
from tests.data.factory import config, layout, make_set, seal

REPLACE = OnError["replace"]
SEED = 5


def overwrite(index: ShardIndex, position: int, kind: str, data: bytes, *, new_checksum: bool = False) -> None:
    """Other bytes in the place of a member; with `new_checksum`, the index takes them for the right ones."""
    record = index.samples[position]
    shard = Path(index.location) / index.shard_name(int(record["shard"]))
    with shard.open("r+b") as file:
        file.seek(int(record[f"{kind}_offset"]))
        file.write(data)
        file.seek(int(record[f"{kind}_offset"]))
        stored = file.read(int(record[f"{kind}_size"]))
    if new_checksum:
        samples = np.load(index.folder / "samples.npy", mmap_mode="r+")
        samples[f"{kind}_checksum"][position] = zlib.crc32(stored)
        samples.flush()
        seal(index.folder)


def flip_a_byte(index: ShardIndex, position: int) -> None:
    overwrite(index, position, "image", b"\x00\x00\xff\xff")


def spoil_the_image(index: ShardIndex, position: int) -> None:
    overwrite(index, position, "image", b"no image at all", new_checksum=True)


def spoil_the_label(index: ShardIndex, position: int) -> None:
    overwrite(index, position, "label", b"no label at all", new_checksum=True)


def label_out_of_range(index: ShardIndex, position: int) -> None:
    """The label of sample 0, which has one id of 77, under the name of sample `position`."""
    import io

    from PIL import Image

    labels = np.zeros((24, 32), np.uint8)
    labels[3, 4] = 77
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "png")
    data = buffer.getvalue()
    samples = np.load(index.folder / "samples.npy", mmap_mode="r+")
    assert len(data) <= samples["label_size"][position]
    samples["label_size"][position] = len(data)
    samples.flush()
    overwrite(ShardIndex.open(index.location), position, "label", data, new_checksum=True)


def truncate_the_tar(index: ShardIndex, position: int) -> None:
    record = index.samples[position]
    shard = Path(index.location) / index.shard_name(int(record["shard"]))
    with shard.open("r+b") as file:
        file.truncate(int(record["image_offset"]) + 20)


def remove_the_tar(index: ShardIndex, position: int) -> None:
    (Path(index.location) / index.shard_name(int(index.samples["shard"][position]))).unlink()


KINDS: list[tuple[Callable[[ShardIndex, int], None], str]] = [
    (flip_a_byte, "its image is not what was indexed (checksum)"),
    (spoil_the_image, "it cannot be used"),
    (spoil_the_label, "it cannot be used"),
    (label_out_of_range, "the label holds 77"),
    (truncate_the_tar, "bytes"),
    (remove_the_tar, "shard-000005.tar"),
]


def damaged(folder: Path, damage: Callable[[ShardIndex, int], None]) -> ShardIndex:
    """13 pairs, one a shard, of which the sixth is damaged."""
    index = make_set(folder, 13, samples_per_shard=1)
    damage(index, 5)
    return ShardIndex.open(index.location)


def stream_of(data: DataConfig, *, world_size: int = 1, rank: int = 0, lines: list[str] | None = None):
    report = (lambda line: None) if lines is None else lines.append
    return TrainingStream(data, seed=SEED, layout=layout(world_size, rank), report=report)


def read(data: DataConfig, *, world_size: int = 1, steps: int = 6) -> dict[tuple[str, int], tuple[Any, ...]]:
    found = {}
    for rank in range(world_size):
        with contextlib.closing(stream_of(data, world_size=world_size, rank=rank).batches(0)) as batches:
            for batch in itertools.islice(batches, steps):
                for domain, part in batch.items():
                    for j, number in enumerate(part["numbers"].tolist()):
                        found[domain, number] = (part["keys"][j], part["images"][j].numpy().tobytes())
    return found


@pytest.mark.parametrize(("damage", "what"), KINDS, ids=[damage.__name__ for damage, _ in KINDS])
def test_a_bad_sample_is_named_in_one_line(tmp_path: Path, damage: Any, what: str) -> None:
    index = damaged(tmp_path, damage)
    with pytest.raises(ValueError) as raised:
        read(config({"source": index.location}, rare_class_sampling=False))
    message = str(raised.value)
    assert "\n" not in message and "shard-000005.tar" in message and what in message
    if damage not in (truncate_the_tar, remove_the_tar):  # a small set's shards are looked at before the first step
        assert "frame_005" in message and "data.on_error=replace" in message


@pytest.mark.parametrize(("damage", "what"), KINDS, ids=[damage.__name__ for damage, _ in KINDS])
def test_a_bad_sample_is_replaced_by_the_next_of_the_order(tmp_path: Path, damage: Any, what: str) -> None:
    index = damaged(tmp_path, damage)
    data = config({"source": index.location}, rare_class_sampling=False, on_error=REPLACE, max_bad_share=0.5)
    lines: list[str] = []
    stream = stream_of(data, lines=lines)
    order = stream.domains["source"].order
    batches = list(itertools.islice(stream.batches(0), 5))
    keys = [key for batch in batches for key in batch["source"]["keys"]]
    expected = [order[n + (order[n].index == 5)].index for n in range(len(keys))]
    assert keys == [f"frame_{i:03d}" for i in expected]
    assert all("replaced" not in batch["source"] for batch in batches)
    assert len(lines) == 1 and "frame_005" in lines[0] and "shard-000005.tar" in lines[0] and what in lines[0]
    count = sum(order[n].index == 5 for n in range(len(keys)))
    assert count > 1 and stream.counters["source_replaced"] == count


def test_every_number_of_ranks_and_workers_replaces_alike(tmp_path: Path) -> None:
    index = damaged(tmp_path, flip_a_byte)
    both = {"source": index.location, "target": index.location}
    data = config(both, on_error=REPLACE, max_bad_share=0.5)
    reference = read(data)
    assert "frame_005" not in {key for key, _ in reference.values()}
    for world_size, num_workers in ((2, 0), (4, 1), (8, 2)):
        found = read(config(both, on_error=REPLACE, max_bad_share=0.5, num_workers=num_workers), world_size=world_size)
        assert found == reference


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_samples_end_the_run(tmp_path: Path, num_workers: int) -> None:
    index = damaged(tmp_path, flip_a_byte)
    data = config({"source": index.location}, rare_class_sampling=False, on_error=REPLACE, num_workers=num_workers)
    message = r"2 bad samples among \d+ of the source are more than data.max_bad_share=0.001 \(of at least 1,000\); .*"
    with pytest.raises(ValueError, match=message):  # of the first 1,000, one
        read(data, steps=40)


def test_a_set_of_bad_samples_ends_the_run(tmp_path: Path) -> None:
    index = make_set(tmp_path, 4)
    for position in range(4):
        flip_a_byte(index, position)
    data = config({"source": index.location}, rare_class_sampling=False, on_error=REPLACE, max_bad_share=0.5)
    with pytest.raises(ValueError, match=r"100 samples in a row are bad, the last: .*checksum"):
        read(data)


def test_validation_never_replaces(tmp_path: Path) -> None:
    index = damaged(tmp_path, flip_a_byte)
    with pytest.raises(ValueError, match="frame_005"):
        list(read_validation(config({"source": index.location}, on_error=REPLACE)))


def test_an_index_that_points_nowhere_is_named(tmp_path: Path) -> None:
    index = make_set(tmp_path, 4, samples_per_shard=1)
    path = index.folder / "samples.npy"
    for field, value, message in (
        ("image_offset", 1 << 50, "the index places it beyond the shard's"),
        ("image_size", (1 << 32) - 1, "the index of sample 2 is damaged"),
        ("shard", 7, "the index of sample 2 is damaged"),
        ("height", 4000, "its index says 4000x32; index the set again, or pack it again"),
    ):
        samples = np.load(path)
        old, samples[field][2] = samples[field][2], value
        np.save(path, samples)
        seal(index.folder)
        reader = stream_of(config({"source": index.location}, crop_size=[24, 32])).domains["source"]
        reader.order = {0: Draw(2)}  # type: ignore[assignment]
        with pytest.raises(ValueError, match=re.escape(message)):
            for _ in range(20):
                reader.batch([0])
        samples[field][2] = old
        np.save(path, samples)


def test_shards_outside_of_the_set_are_not_read(tmp_path: Path) -> None:
    index = make_set(tmp_path, 2, samples_per_shard=1)
    shards = np.load(index.folder / "shards.npy")
    secret = Path(index.location).parent / "b.tar"
    secret.write_bytes((Path(index.location) / "shard-000001.tar").read_bytes())
    changed = shards.astype([("name", "S40"), ("size", np.uint64)])
    changed["name"][1] = b"../b.tar"
    np.save(index.folder / "shards.npy", changed)
    seal(index.folder)
    with pytest.raises(OSError, match=r"\.\./b\.tar. is no plain file name"):
        read(config({"source": index.location}, rare_class_sampling=False))


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    index = make_set(tmp_path, 2)
    path = index.folder / "index.json"
    good = json.loads(path.read_text())
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="damaged"):
        ShardIndex.open(index.location)
    for change in ({"num_samples": 3}, {"num_shards": -1}, {"class_samples": [1] * 19}, {"extra": 1}, {"min_size": []}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match="remove"):
            ShardIndex.open(index.location)


@pytest.mark.parametrize("array", [np.zeros(()), np.zeros((1, 2), np.uint32), np.zeros(2, np.float64)])
def test_arrays_of_another_kind_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    index = make_set(tmp_path, 2, samples_per_shard=1)
    for name in ("shards.npy", "samples.npy", "classes.npy"):
        good = (index.folder / name).read_bytes()
        np.save(index.folder / name, array)
        with pytest.raises(ValueError, match=f"{name} does not fit index.json"):
            ShardIndex.open(index.location)
        (index.folder / name).write_bytes(good)
