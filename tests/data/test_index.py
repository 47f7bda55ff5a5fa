import io
import json
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.data.index import ShardIndex
from iccld.data.indexing import build_index
from iccld.data.reader import ShardReader
from tests.data.factory import HEIGHT, WIDTH, make_set, random_pair, save


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def pair_members(key: str, seed: int) -> dict[str, bytes]:
    image, train_ids = random_pair(seed)
    return {f"{key}.png": png(image), f"{key}.label.png": png(train_ids)}


def test_the_index_says_what_is_in_the_shards(tmp_path: Path) -> None:
    index = make_set(tmp_path, 10)
    assert (len(index), index.header.has_labels, len(index.header.shards)) == (10, True, 3)
    assert isinstance(index.samples, np.memmap) and not index.samples.flags.writeable
    reader = ShardReader(index)
    for i in range(10):
        image, train_ids = random_pair(i)
        found_image, found_ids = reader.read(i, with_labels=True)
        assert found_ids is not None
        np.testing.assert_array_equal(found_image, image)
        np.testing.assert_array_equal(found_ids, train_ids)
        assert index.key(i) == f"frame_{i:03d}"
        assert (index.samples["height"][i], index.samples["width"][i]) == (HEIGHT, WIDTH)
        assert index.samples["class_pixels"][i].tolist() == [int((train_ids == c).sum()) for c in range(19)]


def test_tars_of_plain_tar_are_indexed(tmp_path: Path) -> None:
    for i in range(3):
        image, train_ids = random_pair(i)
        save(tmp_path / "files" / "drive" / f"f{i}.png", image)
        save(tmp_path / "files" / "drive" / f"f{i}.label.png", train_ids)
    shards = tmp_path / "shards"
    shards.mkdir()
    subprocess.run(["tar", "-C", tmp_path / "files", "-cf", shards / "any.tar", "."], check=True)
    index = build_index(shards, dataset="mine")
    reader = ShardReader(index)
    assert index.header.dataset == "mine"
    found = {index.key(i): reader.read(i, with_labels=True) for i in range(3)}
    assert set(found) == {"drive/f0", "drive/f1", "drive/f2"}
    for i in range(3):
        image, train_ids = random_pair(i)
        np.testing.assert_array_equal(found[f"drive/f{i}"][0], image)
        np.testing.assert_array_equal(found[f"drive/f{i}"][1], train_ids)  # type: ignore[arg-type]


def test_long_names_and_unlabelled_sets_are_indexed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{'k' * 200}.png": png(random_pair(0)[0])})
    index = build_index(tmp_path)
    assert index.key(0) == "k" * 200 and not index.header.has_labels
    assert index.samples["class_pixels"].sum() == 0
    assert ShardReader(index).read(0, with_labels=False)[1] is None


def test_an_index_travels_to_other_processes_by_its_path(tmp_path: Path) -> None:
    index = make_set(tmp_path, 5)
    data = pickle.dumps(ShardReader(index))
    assert len(data) < 1000
    image, _ = pickle.loads(data).read(4, with_labels=False)
    np.testing.assert_array_equal(image, random_pair(4)[0])


def test_opening_names_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.x=.*nowhere: there is no such folder; make the shards"):
        ShardIndex.open(tmp_path / "nowhere", setting="data.x")
    with pytest.raises(ValueError, match=r"index.json is missing, so the shards are not finished; make the shards"):
        ShardIndex.open(tmp_path)
    folder = make_set(tmp_path, 5).folder
    header = folder / "index" / "index.json"
    text = header.read_text()
    header.write_text(json.dumps({**json.loads(text), "version": 99}))
    with pytest.raises(ValueError, match=r"index.json is of version 99, this program reads version 1; remove"):
        ShardIndex.open(folder)
    header.write_text(json.dumps({**json.loads(text), "num_samples": 6}))
    with pytest.raises(ValueError, match=r"samples.npy does not fit index.json .*number of samples\); remove"):
        ShardIndex.open(folder)
    (folder / "index" / "samples.npy").rename(folder / "samples.npy")
    with pytest.raises(ValueError, match=r"samples.npy does not fit index.json .*No such file.*; remove"):
        ShardIndex.open(folder)
    (folder / "samples.npy").rename(folder / "index" / "samples.npy")
    header.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is not a whole index .*; remove"):
        ShardIndex.open(folder)
    header.write_text(text)
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"shard-000001.tar has \d+ bytes, its index says \d+; restore it"):
        ShardIndex.open(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000001.tar is missing, but its index names it; restore it"):
        ShardIndex.open(folder)


def test_changed_bytes_are_named_with_shard_and_key(tmp_path: Path) -> None:
    index = make_set(tmp_path, 5)
    shard = index.folder / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[int(index.samples["image_offset"][2]) + 100] ^= 1
    shard.write_bytes(data)
    reader = ShardReader(ShardIndex.open(index.folder))
    reader.read(1, with_labels=True)
    with pytest.raises(ValueError, match=r"shard-000000.tar: the image of sample 'frame_002' is not what was indexed"):
        reader.read(2, with_labels=True)


def test_undecodable_bytes_are_named_with_shard_and_key(tmp_path: Path) -> None:
    image = png(random_pair(0)[0])
    write_tar(tmp_path / "a.tar", {"x.png": image[: len(image) // 2]})
    with pytest.raises(ValueError, match=r"a.tar: sample 'x' cannot be decoded: .*; make the shard again"):
        ShardReader(build_index(tmp_path)).read(0, with_labels=False)


def test_only_a_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iccld.data.reader.MAX_OPEN_SHARDS", 2)
    reader = ShardReader(make_set(tmp_path, 8, samples_per_shard=1))
    for i in [0, 5, 3, 7, 0, 1]:
        np.testing.assert_array_equal(reader.read(i, with_labels=False)[0], random_pair(i)[0])
        assert len(reader._files) <= 2


BAD_TARS = {
    "no image extension in common": {"x.txt": b"hello"},
    "1 of 2 samples have no label.png": {**pair_members("x", 0), "y.png": png(random_pair(1)[0])},
    "a.tar: sample 'x': the image has 24x32 pixels, its label 8x8": {
        "x.png": png(random_pair(0)[0]),
        "x.label.png": png(np.zeros((8, 8), np.uint8)),
    },
    r"a.tar: sample 'x': the label holds \[19, 33\]; labels must be train ids 0-18 or 255": {
        "x.png": png(random_pair(0)[0]),
        "x.label.png": png(np.array([[19, 33] * 16] * 24, np.uint8)),
    },
    "a.tar: sample 'x': it is no image of a known format": {"x.png": b"no image"},
}


@pytest.mark.parametrize("message", BAD_TARS)
def test_bad_tars_are_named(tmp_path: Path, message: str) -> None:
    write_tar(tmp_path / "a.tar", BAD_TARS[message])
    with pytest.raises(ValueError, match=message):
        build_index(tmp_path)
    assert not (tmp_path / "index").exists()


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no .tar files to index"):
        build_index(tmp_path)
    write_tar(tmp_path / "a.tar", pair_members("x", 0) | pair_members("y", 1))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"a.tar is not a whole, uncompressed tar .*make it again"):
        build_index(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("x.png")
            tar.addfile(member, io.BytesIO())
    with pytest.raises(ValueError, match=r"x.png is there twice; keys must be unique"):
        build_index(tmp_path)
    (tmp_path / "a.tar").write_bytes(whole)
    build_index(tmp_path)
    with pytest.raises(ValueError, match="index is there already; remove it"):
        build_index(tmp_path)
