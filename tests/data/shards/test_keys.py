"""Files of keys, in whatever encoding a user's editor leaves them, name the samples that `info --keys` prints."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.data.config import DatasetConfig
from iccld.data.storage.index import ShardIndex, sample_dtype, shard_dtype, write_index
from iccld.data.stream.sets import open_sets
from tests.data.factory import config

KEYS = ["a", "a ", " a", "b", "b c", "M\u00fcnster/1", "\u6771\u4eac", "-"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("keys")
    samples = np.zeros(len(KEYS), sample_dtype(20))
    samples["key"], samples["height"], samples["width"], samples["image_size"] = [k.encode() for k in KEYS], 64, 64, 9
    samples["label_size"], samples["class_pixels"][:, 0] = 9, 4000
    (folder / "index").mkdir()
    (folder / "a.tar").write_bytes(bytes(9))
    write_index(folder / "index", dataset="", shards=np.array([(b"a.tar", 9)], shard_dtype(5)), samples=samples)
    return ShardIndex.open(folder)


def positions(index: ShardIndex, path: Path) -> list[int]:
    data = config({"source": index.location}, source=DatasetConfig("s", index.location, keys=str(path)))
    (part,) = open_sets(data, "source", with_labels=True)
    return list(part.positions)


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.lists(st.sampled_from(KEYS), min_size=1, unique=True),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
def test_what_info_prints_is_found(
    index: ShardIndex, tmp_path_factory: pytest.TempPathFactory, chosen: list[str], end: str, encoding: str
) -> None:
    path = tmp_path_factory.mktemp("file") / "keys.txt"
    path.write_bytes((end.join(chosen) + end).encode(encoding))
    assert positions(index, path) == sorted(map(KEYS.index, chosen))


def test_blanks_of_an_editor_are_no_part_of_a_key(index: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("b  \n\n \t\n\tb c\na\n")
    assert positions(index, tmp_path / "keys.txt") == [0, 3, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nStra\xdfe", r"data.source.keys=.*keys.txt: line 2 is no UTF-8 \(Latin-1 or Windows-1252\?\); save it"),
        (b"a\nz\ny", r"data.source.keys=.*keys.txt: 2 of its 3 keys are not in .* \(y, z\); write them as"),
        (b"\n", r"0 of its 0 keys are not in .* \(no key at all\)"),
        (None, r"data.source.keys=.*keys.txt: there is no such file"),
    ],
)
def test_what_is_wrong_is_one_line(index: ShardIndex, tmp_path: Path, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / "keys.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        positions(index, tmp_path / "keys.txt")
    assert "\n" not in str(error.value)
