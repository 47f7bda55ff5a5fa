import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from iccld.data.storage.index import ShardIndex, rank_samples, sample_dtype, shard_dtype, write_index
from tests.data.factory import HEIGHT, WIDTH, make_set, random_pair, write_index_anew


def test_the_index_says_what_is_in_the_shards(tmp_path: Path) -> None:
    index = make_set(tmp_path, 10)
    header = index.header
    assert (len(index), header.has_labels, header.num_shards, header.dataset) == (10, True, 3, "folder")
    assert header.min_size == header.max_size == [HEIGHT, WIDTH]
    assert isinstance(index.samples, np.memmap) and not index.samples.flags.writeable
    shown = np.array([[(random_pair(i)[1] == c).sum() for c in range(19)] for i in range(10)])
    np.testing.assert_array_equal(index.samples["class_pixels"], shown)
    assert header.class_pixels == shown.sum(0).tolist()
    assert header.class_samples == (shown > 0).sum(0).tolist()
    assert header.num_bytes == index.samples["image_size"].sum() + index.samples["label_size"].sum()
    assert [index.key(i) for i in range(10)] == [f"frame_{i:03d}" for i in range(10)]
    for shard in range(3):
        assert (Path(index.location) / index.shard_name(shard)).stat().st_size == index.shards["size"][shard]


@given(hnp.arrays(np.uint32, st.tuples(st.integers(0, 12), st.integers(1, 4)), elements=st.integers(0, 3)))
def test_samples_are_ranked_by_their_pixels(pixels: np.ndarray) -> None:
    for column, ranked in zip(pixels.T, rank_samples(pixels), strict=True):
        assert ranked.tolist() == sorted(np.flatnonzero(column).tolist(), key=lambda row: (-int(column[row]), row))


def test_the_samples_of_a_class_are_found(tmp_path: Path) -> None:
    index = make_set(tmp_path, 10)
    for train_id, ranked in enumerate(rank_samples(index.samples["class_pixels"])):
        np.testing.assert_array_equal(index.samples_with(train_id), ranked)


def test_an_index_travels_to_other_processes_by_its_path(tmp_path: Path) -> None:
    index = make_set(tmp_path, 5)
    data = pickle.dumps(index)
    assert len(data) < 1000
    assert pickle.loads(data).key(4) == "frame_004"


def test_another_process_maps_the_same_index_or_none(tmp_path: Path) -> None:
    index = make_set(tmp_path, 5)
    data = pickle.dumps(index)
    samples, shards = np.array(index.samples)[:4], np.array(index.shards)
    write_index_anew(index.folder, shards=shards, samples=samples)
    with pytest.raises(ValueError, match=r"index: the set was indexed anew while it was in use; give the same"):
        pickle.loads(data)


@pytest.mark.parametrize("name", ["samples.npy", "classes.npy", "shards.npy"])
@pytest.mark.parametrize("field", [None, "num_samples", "num_shards"])
def test_an_array_is_looked_at_before_it_is_read(tmp_path: Path, name: str, field: str | None) -> None:
    index = make_set(tmp_path, 5)
    (index.folder / name).unlink()
    os.mkfifo(index.folder / name)
    if field:
        (index.folder / "index.json").write_text(
            json.dumps({**asdict(index.header), field: 0, "class_samples": [0] * 19})
        )
    with pytest.raises(
        ValueError, match=r"npy does not fit index.json \(it (is a FIFO, no file|has other|has [\d,]+ bytes)"
    ):
        ShardIndex.open(index.location)


def test_a_file_of_any_size_is_not_read_for_an_empty_array(tmp_path: Path) -> None:
    index = make_set(tmp_path, 5)
    header = {**asdict(index.header), "num_samples": 0, "class_samples": [0] * 19}
    (index.folder / "index.json").write_text(json.dumps(header))
    with (index.folder / "samples.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (1 << 37,)})
        file.truncate(file.tell() + (1 << 40))
    with pytest.raises(ValueError, match=r"samples.npy does not fit index.json \(it has 1,099,511,[\d,]+ bytes, so"):
        ShardIndex.open(index.location)


def test_its_fingerprint_changes_with_any_sample(tmp_path: Path) -> None:
    first, second = make_set(tmp_path / "a", 5), make_set(tmp_path / "b", 5)
    assert first.fingerprint() == second.fingerprint()
    assert make_set(tmp_path / "c", 4).fingerprint() != first.fingerprint()
    samples = np.array(first.samples)
    samples["label_checksum"][3] += 1
    folder = tmp_path / "d" / "index"
    folder.mkdir(parents=True)
    write_index(folder, dataset="folder", shards=first.shards, samples=samples)
    assert ShardIndex.open(tmp_path / "d").fingerprint()["index"] != first.fingerprint()["index"]


def test_opening_names_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.x=.*nowhere: there is no such folder; make the shards"):
        ShardIndex.open(tmp_path / "nowhere", setting="data.x")
    with pytest.raises(ValueError, match=r"index.json is missing, so the shards are not finished; make the shards"):
        ShardIndex.open(tmp_path)
    index = make_set(tmp_path, 5)
    path, whole = index.folder / "index.json", asdict(index.header)
    for change, message in (
        ({"version": 99}, r"index.json has version 99, this program reads 2 and 3; remove the index and make"),
        ({"num_samples": 6}, r"samples.npy does not fit index.json .*another length"),
        ({"num_shards": -1}, r"index.json is damaged \(its numbers do not fit each other\); remove"),
        ({"class_pixels": [1]}, r"index.json is damaged"),
        ({"surprise": 1}, r"index.json is damaged .*surprise"),
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(ValueError, match=message):
            ShardIndex.open(index.location)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged .*; remove the index"):
        ShardIndex.open(index.location)
    path.write_text(json.dumps(whole))
    (index.folder / "samples.npy").rename(tmp_path / "samples.npy")
    with pytest.raises(ValueError, match=r"samples.npy does not fit index.json .*No such file"):
        ShardIndex.open(index.location)


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    write_index(folder, dataset="", shards=np.empty(0, shard_dtype(1)), samples=np.empty(0, sample_dtype(1)))
    with pytest.raises(ValueError, match="the set is empty; make the shards"):
        ShardIndex.open(tmp_path)
