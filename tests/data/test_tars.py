import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.data.indexing import index_shard
from iccld.data.tars import read_members, split_name
from tests.data.factory import pair_members, png, random_pair, write_tar
from tests.data.test_indexing import assert_holds_pairs, build, opened


def test_keys_and_extensions_are_those_of_webdataset(tmp_path: Path) -> None:
    names = ["a.png", "b/c.d/e.png", "b/f.PNG", "b/g.left.png", "__meta__/x.png", "__h__x.png", "noextension"]
    data = png(random_pair(0)[0])
    write_tar(tmp_path / "a.tar", dict.fromkeys(names, data))
    theirs = {}
    for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False):
        theirs[sample["__key__"]] = {name for name in sample if not name.startswith("__")}
    ours: dict[str, set[str]] = {}
    for key, extension in filter(None, map(split_name, names)):
        ours.setdefault(key, set()).add(extension)
    assert ours == theirs
    assert split_name("b/._a.png") is None, "what macOS leaves beside files is no sample"


def test_keys_that_fit_no_index_are_named(tmp_path: Path) -> None:
    image = png(random_pair(0)[0])
    keys = {"k" * 1025: "1025 bytes, 1024 at most", "a\nb": "control characters", "\udcff": "is not UTF-8"}
    write_tar(tmp_path / "a.tar", {f"{key}.png": image for key in (*keys, "k" * 1024, "\u00e9")})
    result = build(tmp_path, accept_bad=True)
    for problem, (key, what) in zip(result.problems, keys.items(), strict=True):
        assert problem.key == key and what in problem.what and "rename it" in problem.remedy
        assert str(problem).isprintable()
    index = opened(result)
    assert [index.key(i) for i in range(len(index))] == ["k" * 1024, "\u00e9"]


def test_the_first_of_two_members_of_one_name_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for seed in (0, 1):
            for name, data in pair_members("x", seed).items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    result = build(tmp_path, accept_bad=True)
    for problem, name in zip(result.problems, ("x.png", "x.label.png"), strict=True):
        assert problem.key == "x" and problem.what == f"{name} is there twice"
        assert problem.remedy == "make keys unique, or leave out what is bad with --accept-bad (the first one counts)"
    assert_holds_pairs(opened(result), {"x": 0})


def whole_tar(folder: Path) -> bytes:
    pairs = [pair_members(f"x{i}", i) for i in range(3)]
    return write_tar(folder / "a.tar", pairs[0] | pairs[1] | pairs[2]).read_bytes()


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_of_a_cut_tar_the_whole_samples_are_used(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = whole_tar(folder)
    full = index_shard(folder / "a.tar", 0).records
    end = len(whole.rstrip(b"\0"))
    cut = int(share * (end // 512 + 1) * 512)
    (folder / "a.tar").write_bytes(whole[:cut])
    records, problems, _ = index_shard(folder / "a.tar", 0)
    label_ends = full["label_offset"] + full["label_size"]
    usable = int((label_ends <= cut).sum())
    np.testing.assert_array_equal(records[:usable], full[:usable])
    assert not records["label_size"][usable:].any(), "one more may have lost its label, which a set would find out"
    assert len(problems) == 1 and "a.tar: it is no whole, uncompressed tar: cut off or damaged from byte" in str(
        problems[0]
    )


def test_a_damaged_header_is_named_and_what_lies_before_is_used(tmp_path: Path) -> None:
    data = bytearray(whole_tar(tmp_path))
    full = index_shard(tmp_path / "a.tar", 0).records
    data[int(full["image_offset"][2]) - 512] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    result = build(tmp_path, accept_bad=True)
    assert f"cut off or damaged from byte {full['image_offset'][2] - 512} on" in result.problems[0].what
    assert_holds_pairs(opened(result), {"x0": 0, "x1": 1})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_hostile_headers_do_no_harm(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    tar = bytearray(whole_tar(folder))
    start = 512 * data.draw(st.integers(0, 3))
    field = data.draw(st.sampled_from([(124, 12), (156, 1), (0, 100), (345, 155)]))
    tar[start + field[0] : start + sum(field)] = data.draw(st.binary(min_size=field[1], max_size=field[1]))
    header = tar[start : start + 512]
    header[148:156] = b" " * 8
    tar[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    (folder / "a.tar").write_bytes(tar)
    records = index_shard(folder / "a.tar", 0).records
    assert len(records) <= 3
    assert (records["image_offset"] + records["image_size"] <= len(tar)).all()


def test_a_negative_size_does_not_go_round_in_circles(tmp_path: Path) -> None:
    data = bytearray(whole_tar(tmp_path))
    start = 2 * 512 + int(index_shard(tmp_path / "a.tar", 0).records["image_size"][0]) // 512 * 512
    data[start + 124 : start + 136] = b"\xff" * 10 + b"\xf6\x00"
    header = data[start : start + 512]
    header[148:156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(data)
    found, problems, _ = read_members(tmp_path / "a.tar")
    assert list(found) == ["x0"] and "(a member of negative size)" in str(problems[0])


def test_sparse_members_are_named(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for name in ("x.png", "y.png"):
        (files / name).write_bytes(png(random_pair(0)[0]))
    with (files / "y.png").open("r+b") as file:
        file.truncate(1 << 20)
    subprocess.run(["tar", "--sparse", "-C", files, "-cf", tmp_path / "a.tar", "x.png", "y.png"], check=True)
    records, problems, _ = index_shard(tmp_path / "a.tar", 0)
    assert records["key"].tolist() == [b"x"]
    assert "sample 'y': y.png is stored sparse; pack without tar's --sparse, or leave out" in str(problems[0])
