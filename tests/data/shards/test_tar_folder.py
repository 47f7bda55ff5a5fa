"""Other files in a folder of tars are read, named, or counted; none is waited for."""

import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from iccld.cli import main
from iccld.data.shards.tar_folder import look_into
from iccld.data.shards.verifying import verify_shards
from iccld.data.storage.index import ShardIndex
from tests.data.factory import pair_members, write_index_anew, write_tar
from tests.data.shards.test_indexing import assert_holds_pairs, build, opened


def pack(path: Path, key: str = "b") -> Path:
    """A whole tar under any name."""
    write_tar(path.with_name("whole"), pair_members(key, 1)).rename(path)
    return path


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.png", b"")


def link_to_tars(path: Path) -> None:
    """A link to a folder in which a sub-folder is a link, too."""
    write_tar(path.with_name(".far") / "day" / "d.tar", {})
    path.mkdir()
    (path / "day").symlink_to("../.far/day")


NAMED = {
    "days": (link_to_tars, "in it, .*days/day is a link to a folder elsewhere, which is not entered"),
    "b.tar.gz": (lambda path: path.write_bytes(gzip.compress(b"x")), "packed (by gzip); shards must be plain tars"),
    "b.TGZ": (lambda path: path.write_bytes(b""), "packed (by its name's ending); shards must be plain tars"),
    "b.tar.zst": (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd1"), "packed (by zstd); .*unpack it \\(zstd -d\\)"),
    "b.zip": (archive, "packed (by zip); shards must be plain tars"),
    "b.tar.1": (pack, "it is a tar, but its name does not end in .tar"),
    "b.tar.part": (lambda path: path.write_bytes(b""), "it is half-made, by its name"),
    "x.tar": (os.mkfifo, "it is a FIFO, no file"),
    "y.tar": (Path.mkdir, "it is a folder, no file"),
    "z.tar": (lambda path: path.symlink_to("gone"), "it is a link to nothing, no file"),
    "linked": (lambda path: path.symlink_to("gone"), "it is a link to nothing, no file"),
    "a\udcff.tar": (pack, "its name has control characters or is not UTF-8"),
    "up": (lambda path: path.symlink_to("/"), "it is a link to a folder elsewhere, which is not entered"),
    "many": (lambda path: [write_tar(path / f"{n}.tar", {}) for n in range(20)], "it holds 10 or more tars, such as "),
    "sub": (
        lambda path: write_tar(path / "deep" / "d.tar", {}),
        "it holds 1 tars, such as .*sub/deep/d.tar, which are",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_may_hold_samples_is_named_with_a_status(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "a.tar", pair_members("x", 0))
    make, _ = NAMED[name]
    make(tmp_path / name)
    (problem,) = look_into(tmp_path).problems
    assert problem.file == str(tmp_path / name)
    assert main(["shards", "index", str(tmp_path), "--workers", "1"]) == 1
    assert main(["shards", "index", str(tmp_path), "--workers", "1", "--accept-bad"]) == 0
    assert_holds_pairs(ShardIndex.open(tmp_path), {"x": 0})
    assert main(["shards", "verify", str(tmp_path), "--workers", "1"]) == 1
    errors = capsys.readouterr().err
    assert errors.count(str(problem)) == 3 and str(problem).isprintable()


@pytest.mark.parametrize("name", NAMED)
def test_its_line_says_what_it_is(tmp_path: Path, name: str) -> None:
    make, what = NAMED[name]
    make(tmp_path / name)
    (problem,) = look_into(tmp_path).problems
    start, _, end = what.partition(".*")
    assert start in str(problem) and end.replace("\\", "") in str(problem)


def test_tars_are_read_whatever_their_letters_case_and_through_links(tmp_path: Path) -> None:
    write_tar(tmp_path / "far" / "x.tar", pair_members("x", 0))
    write_tar(tmp_path / "set" / "b.TAR", pair_members("y", 1))
    (tmp_path / "set" / "a.tar").symlink_to("../far/x.tar")
    result = build(tmp_path / "set")
    assert_holds_pairs(opened(result), {"x": 0, "y": 1})
    assert not result.passed_over.kinds


def test_what_holds_no_samples_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pair_members("x", 0))
    for name in ("README", "a.tar.idx", "a.tar.md5", "._a.tar", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0\5")
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "notes" / "up").mkdir(parents=True)
    (tmp_path / "notes" / "up" / "again").symlink_to("..")
    write_tar(tmp_path / "val" / "a.tar", pair_members("y", 1))
    opened(build(tmp_path / "val"))
    result = build(tmp_path)
    assert_holds_pairs(opened(result), {"x": 0})
    assert result.passed_over.lines() == [
        "2 hidden files or folders passed over, such as .DS_Store",
        "4 other files passed over, such as README",
        "2 other folders passed over, such as notes",
    ]


def test_a_folder_with_nothing_but_packed_tars_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"x"))
    for more in ([], ["--accept-bad"]):
        assert main(["shards", "index", str(tmp_path), "--workers", "1", *more]) == 1
        assert "unpack it (gunzip)" in capsys.readouterr().err


def test_a_tar_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    write_tar(tmp_path / "a.tar", pair_members("x", 0))
    write_tar(tmp_path / "b.tar", pair_members("y", 1)).chmod(0)
    if os.access(tmp_path / "b.tar", os.R_OK):  # as root
        from iccld.data.shards import indexing

        read = indexing.read_members
        monkeypatch.setattr(indexing, "read_members", lambda path: refuse(path) if path.stem == "b" else read(path))
    result = build(tmp_path, accept_bad=True)
    assert [str(problem) for problem in result.problems] == [
        f"{tmp_path}/b.tar: it cannot be read (Permission denied); make it readable, or leave out what is bad with "
        "--accept-bad."
    ]
    assert_holds_pairs(opened(result), {"x": 0})


def test_verify_names_what_the_index_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", pair_members("x", 0))
    opened(build(tmp_path))
    write_tar(tmp_path / "new.tar", pair_members("y", 1))
    for name in ("making", "indexing", "index.tmp", "index.0123abcd.tmp"):
        (tmp_path / name).mkdir()
    assert main(["shards", "verify", str(tmp_path), "--workers", "1"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0].removeprefix(f"broken: {tmp_path}/") for line in errors] == [
        "new.tar: its index does not know this tar",
        "index.0123abcd.tmp: a command has not finished here",
        "index.tmp: a command has not finished here",
        "indexing: a command has not finished here",
        "making: a command has not finished here",
    ]


@pytest.mark.parametrize("left_out", [0, 1, None])
def test_verify_names_samples_that_the_index_lacks(tmp_path: Path, left_out: int | None) -> None:
    """An index made before links were read lacks them; those that it left out knowingly are not named."""
    write_tar(tmp_path / "a.tar", pair_members("x", 0) | pair_members("y", 1) | {"x.json": b"{}"})
    index = opened(build(tmp_path))
    settings = {} if left_out is None else {"left_out": left_out}
    samples, shards = np.array(index.samples)[:1], np.array(index.shards)
    write_index_anew(index.folder, shards=shards, samples=samples, settings=settings)
    result = verify_shards(tmp_path, progress=lambda line: None)
    assert result.passed_over.lines() == [
        "1 members that the index does not use, such as a.tar: x.json",
        "1 samples of the tars that are not in the index, such as a.tar: y",
    ]
    found = [problem.what for problem in result.problems]
    expected = "it lacks 1 samples of the tars, such as a.tar: y, of which it left out 0 knowingly"
    assert found == ([expected] if left_out == 0 else [])
