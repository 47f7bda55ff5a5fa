import gzip
import io
import os
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.data.shards.indexing import index_shard
from iccld.data.shards.tars import read_members, split_name
from tests.data.factory import pair_members, png, random_pair, write_tar
from tests.data.shards.test_indexing import assert_holds_pairs, build, opened


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
    full = index_shard(folder / "a.tar", 0, num_classes=19).records
    end = len(whole.rstrip(b"\0"))
    cut = int(share * (end // 512 + 1) * 512)
    (folder / "a.tar").write_bytes(whole[:cut])
    records, problems, _ = index_shard(folder / "a.tar", 0, num_classes=19)
    label_ends = full["label_offset"] + full["label_size"]
    usable = int((label_ends <= cut).sum())
    np.testing.assert_array_equal(records[:usable], full[:usable])
    assert not records["label_size"][usable:].any(), "one more may have lost its label, which a set would find out"
    assert len(problems) == 1 and "a.tar: it is no whole, uncompressed tar: cut off or damaged from byte" in str(
        problems[0]
    )


def test_a_damaged_header_is_named_and_what_lies_before_is_used(tmp_path: Path) -> None:
    data = bytearray(whole_tar(tmp_path))
    full = index_shard(tmp_path / "a.tar", 0, num_classes=19).records
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
    records = index_shard(folder / "a.tar", 0, num_classes=19).records
    assert len(records) <= 3
    assert (records["image_offset"] + records["image_size"] <= len(tar)).all()


def test_a_negative_size_does_not_go_round_in_circles(tmp_path: Path) -> None:
    data = bytearray(whole_tar(tmp_path))
    start = 2 * 512 + int(index_shard(tmp_path / "a.tar", 0, num_classes=19).records["image_size"][0]) // 512 * 512
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
    records, problems, _ = index_shard(tmp_path / "a.tar", 0, num_classes=19)
    assert records["key"].tolist() == [b"x"]
    assert "sample 'y': y.png is stored sparse; pack without tar's --sparse, or leave out" in str(problems[0])


def write_members(path: Path, members: list[tuple[str, bytes | tuple[bytes, str]]]) -> None:
    """A tar of files (bytes) and of other members (type and what it links to)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                tar.addfile(member)


HARD, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=pax"], ["--format=v7"], ["--format=ustar", "-P"]])
def test_links_of_plain_tar_are_the_bytes_that_they_lead_to(tmp_path: Path, kind: str, options: list[str]) -> None:
    files, shards = tmp_path / "files", tmp_path / "shards"
    (files / "b").mkdir(parents=True)
    shards.mkdir()
    for name, data in pair_members("x", 0).items():
        (files / name).write_bytes(data)
        copy = files / "b" / name.replace("x", "y")
        if kind == "hard":
            copy.hardlink_to(files / name)
        else:
            copy.symlink_to(f"../{name}")
    subprocess.run(["tar", "-C", files, *options, "-cf", shards / "a.tar", "."], check=True)
    result = build(shards)
    assert_holds_pairs(opened(result), {"x": 0, "b/y": 0})
    assert not result.passed_over.kinds
    theirs = {sample["__key__"] for sample in webdataset.WebDataset(str(shards / "a.tar"), shardshuffle=False)}
    assert len(theirs) == 1, "webdataset passes links over"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_link_is_its_target_or_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Chains, circles and dangling links in any order, against following them one by one."""
    folder, names = tmp_path_factory.mktemp("links"), [f"k{i}.png" for i in range(5)]
    files = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    leads = {name: data.draw(st.sampled_from([*names, "gone.png", "../k0.png"])) for name in names if name not in files}
    content = {name: png(random_pair(i)[0]) for i, name in enumerate(names)}
    order = data.draw(st.permutations(names))
    kinds = {name: data.draw(st.sampled_from([HARD, SOFT])) for name in leads}
    write_members(
        folder / "a.tar", [(name, content[name] if name in files else (kinds[name], leads[name])) for name in order]
    )
    records, problems, _ = index_shard(folder / "a.tar", 0, num_classes=19, label_extension="")
    ends = {}
    for name in names:
        end, steps = name, 0
        while end in leads and steps < 9:
            end, steps = leads[end], steps + 1
        ends[name] = end if end in files else None
    places = dict(zip(records["key"].tolist(), records["image_offset"].tolist(), strict=True))
    assert set(places) == {name.removesuffix(".png").encode() for name, end in ends.items() if end}
    for name, end in ends.items():
        if end:
            assert places[name[:2].encode()] == places[end[:2].encode()]
    assert sorted(problem.key for problem in problems) == sorted(name[:2] for name, end in ends.items() if not end)


def test_what_is_no_file_is_named_where_a_sample_needs_it_and_counted_elsewhere(tmp_path: Path) -> None:
    fifo, device = (tarfile.FIFOTYPE, ""), (tarfile.CHRTYPE, "")
    image, label = pair_members("x", 0).values()
    strange: list[tuple[str, bytes | tuple[bytes, str]]] = [
        ("a.png", fifo), ("a.label.png", label), ("b.png", image), ("b.label.png", device), ("pipe", fifo),
        ("c.png", (b"Z", "")), ("day2", (SOFT, "../disk/day2")), ("now", (SOFT, "frames")), ("._x.png", b""),
        ("README", b""), ("readme", (HARD, "README")), ("__meta__/x.png", b""), ("frames/x.png", image),
        ("frames/x.label.png", label), ("frames/x.json", (SOFT, "gone")), ("/abs/y.png", image),
        ("/abs/y.label.png", label),
    ]  # fmt: skip
    write_members(tmp_path / "a.tar", strange)
    result = build(tmp_path, accept_bad=True)
    assert [problem.what for problem in result.problems] == [
        "day2 is a symbolic link to ../disk/day2, which is no file of this tar",
        "a.png is a FIFO, no file",
        "b.label.png is a device, no file",
        "c.png is a member of the unknown type b'Z', no file",
    ]
    assert_holds_pairs(opened(result), {"frames/x": 0, "/abs/y": 0})
    assert result.passed_over.lines() == [
        "1 members passed over: of other kinds than files, such as a.tar: pipe",
        "1 members passed over: hidden names, such as a.tar: ._x.png",
        "2 members passed over: names without an ending, such as a.tar: README",
        "1 members passed over: names of webdataset's own (__NAME__), such as a.tar: __meta__/x.png",
        "2 members with absolute names, or with .. or \\ in them; their keys are kept as they are, such as a.tar: "
        "/abs/y.png",
        "1 members passed over: links to folders in the tar, such as a.tar: now",
        "1 members not used: .json, such as a.tar: frames/x.json",
    ]


@settings(max_examples=30, deadline=None)
@given(padding=st.integers(0, 3000), tail=st.binary(min_size=1, max_size=40).filter(any))
def test_bytes_after_the_end_mark_are_named(
    tmp_path_factory: pytest.TempPathFactory, padding: int, tail: bytes
) -> None:
    folder = tmp_path_factory.mktemp("tail")
    whole = whole_tar(folder)
    (folder / "a.tar").write_bytes(whole + bytes(padding))
    assert not read_members(folder / "a.tar").problems
    (folder / "a.tar").write_bytes(whole + bytes(padding) + tail)
    start = len(whole) + padding + len(tail) - len(tail.lstrip(b"\0"))
    samples, (problem,), _ = read_members(folder / "a.tar")
    assert len(samples) == 3 and f"bytes follow its end mark, from byte {start} on" in problem.what


def test_a_second_tar_joined_to_it_is_named(tmp_path: Path) -> None:
    whole = whole_tar(tmp_path)
    (tmp_path / "a.tar").write_bytes(whole * 2)
    (problem,) = build(tmp_path).problems
    assert f"{len(whole)} bytes follow its end mark, from byte {len(whole)} on" in problem.what


def test_a_packed_tar_by_another_name_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole_tar(tmp_path)))
    (problem,) = read_members(tmp_path / "a.tar").problems
    assert "packed by gzip" in problem.what and "unpack it first (gunzip)" in problem.remedy


def test_accents_composed_in_two_ways_are_one_key(tmp_path: Path) -> None:
    (image, label), key = pair_members("x", 0).values(), "M\u00fcnster"
    other = unicodedata.normalize("NFD", key)
    write_tar(tmp_path / "a.tar", {f"{other}.png": image, f"{key}.label.png": label})
    assert_holds_pairs(opened(build(tmp_path)), {other: 0})
    write_tar(tmp_path / "b" / "a.tar", pair_members(key, 0) | pair_members(other, 1))
    assert [problem.what[-14:] for problem in build(tmp_path / "b").problems] == ["is there twice"] * 2


def test_a_header_takes_no_more_memory_than_it_needs(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**40
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**40)
    (problem,) = read_members(tmp_path / "a.tar").problems
    assert "a header of 1099511627776 bytes" in problem.what


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="it is a FIFO, no file"):
        read_members(tmp_path / "x.tar")
