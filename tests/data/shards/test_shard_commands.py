import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.cli import main
from iccld.data.images.decode import decode_image
from iccld.data.shards import verifying as verify
from iccld.data.storage.base import StorageConfig
from iccld.data.storage.index import ShardIndex
from tests.data.factory import pair_members, write_folder, write_tar
from tests.data.shards.test_making import assert_all_named, members, spoil


def test_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    paths = ["--input", str(raw), "--output", str(tmp_path / "out")]
    command = ["shards", "make", "--dataset", "folder", "--classes", "cityscapes", *paths]
    command += ["--workers", "1", "--bytes-per-shard", "1M", "--size"]
    assert main([*command, "24"]) == 2
    assert "--size 24 must be HEIGHTxWIDTH" in capsys.readouterr().err
    expected = spoil(raw)
    assert main([*command, "24x32"]) == 1
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert_all_named([line for line in errors if line.startswith("bad: ")], expected)
    assert "5 bad pairs" in errors[-1] and "is not finished" in errors[-1]
    assert captured.out.startswith("shard-000000-*.tar: 1 of 1, ") and captured.out.endswith("left, 5 bad pairs\n")
    assert main([*command, "24x32", "--accept-bad"]) == 0
    assert "4 samples, 5 pairs left out" in capsys.readouterr().out
    assert main([*command, "24x32", "--accept-bad"]) == 0
    assert "4 samples, 5 pairs left out" in capsys.readouterr().out, "also of a set that is kept"
    index = ShardIndex.open(tmp_path / "out")
    settings = index.header.settings
    assert (settings["height"], settings["image_format"], settings["quality"]) == (24, "jpg", 95)
    assert settings["bytes_per_shard"] == 2**20
    with Image.open(raw / "images" / "frame_000.png") as image:
        stored = decode_image(members(index, 0)[0])
        assert np.abs(stored.astype(int).mean((0, 1)) - np.asarray(image).mean((0, 1))).max() < 8


def test_a_missing_writer_of_tars_is_named_before_the_input_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)  # as if it were not installed
    raw = write_folder(tmp_path / "raw", 1, labels=False)
    paths = ["--input", str(raw), "--output", str(tmp_path / "out")]
    assert main(["shards", "make", "--dataset", "folder", *paths]) == 2
    assert capsys.readouterr() == ("", "iccld shards needs webdataset; pip install 'iccld[train]'\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "kitty"], "--dataset kitty is unknown; use one of"),
        (["--bytes-per-shard", "1T"], "--bytes-per-shard 1T must be a number of bytes, as in 256M or 1G."),
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (["--size", "0x0"], "--size 0x0 must be HEIGHTxWIDTH in pixels, as in 512x1024."),
        (["--size", "99999999x99999999"], "--size 99999999x99999999 is too large: an image may have 65500 pixels a"),
        (["--output", f"{__file__}/out"], f"--output {__file__}/out cannot be a folder (Not a directory); use another"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    raw = write_folder(tmp_path / "raw", 1)
    paths = ["--input", str(raw), "--output", str(tmp_path / "out")]
    command = ["shards", "make", "--dataset", "folder", "--classes", "cityscapes", *paths]
    assert main([*command, *options]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


def test_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{name.replace("label", "seg"): data for name, data in pair_members(f"x{i}", i).items()} for i in range(3)]
    write_tar(tmp_path / "a.tar", pairs[0] | pairs[1])
    write_tar(tmp_path / "b.tar", pairs[2] | {"bad.png": b"no image"})
    command = ["shards", "index", str(tmp_path), "--dataset", "mine", "--label-extension", "seg.png", "--workers", "2"]
    assert main(command) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(f"bad: {tmp_path}/b.tar: sample 'bad': the image cannot be decoded (it is no image")
    assert errors[1] == f"1 problems: {tmp_path} is not indexed."
    assert main([*command, "--accept-bad"]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path}: 3 samples indexed, 1 problems.\n")
    index = ShardIndex.open(tmp_path)
    assert (index.header.dataset, len(index), index.header.has_labels) == ("mine", 3, True)
    assert main(command) == 2
    assert "index is there already; remove it" in capsys.readouterr().err


def test_index_without_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pair_members("x", 0) | {"x.label.png": b"not in train ids"})
    assert main(["shards", "index", str(tmp_path), "--no-labels", "--workers", "1"]) == 0
    assert not ShardIndex.open(tmp_path).header.has_labels


@pytest.mark.parametrize(("action", "module"), [("info", "describing"), ("verify", "verifying")])
def test_a_server_that_is_away_is_soon_given_up(
    action: str, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify.STORAGE.retry_for_s <= 30 < StorageConfig().retry_for_s
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(f"iccld.data.shards.{module}.STORAGE", StorageConfig(retry_for_s=0.0))
    assert main(["shards", action, "http://127.0.0.1:1/x"]) == 75  # it may be back later
    assert "http://127.0.0.1:1/x/index/index.json: its size: failed (" in capsys.readouterr().err
