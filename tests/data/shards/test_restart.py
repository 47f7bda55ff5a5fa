"""Making shards is interrupted, in several ways, and goes on."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iccld.cli import main
from iccld.data.shards.indexing import IndexResult
from iccld.data.shards.making import MakeShardsConfig, make_shards
from iccld.data.shards.packing import ImageFormat
from iccld.data.storage.index import ShardIndex
from iccld.outcome import AGAIN
from tests.data.factory import write_folder
from tests.data.shards.test_making import make, members, opened, read_all, spoil

COUNT, SAMPLES_PER_SHARD = 12, 2
MANY = 90
"""More shards of one sample than a pipe of 4 KiB takes lines of progress: nobody reads, so the process waits."""


def command(raw: Path, output: Path, *options: str, samples_per_shard: int = SAMPLES_PER_SHARD) -> list[str]:
    sizes = ["--samples-per-shard", str(samples_per_shard), "--image-format", "png"]
    return [
        "shards",
        "make",
        "--dataset",
        "folder",
        "--classes",
        "cityscapes",
        "--input",
        str(raw),
        "--output",
        str(output),
        *sizes,
        *options,
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(raw: Path, output: Path, *, samples_per_shard: int = SAMPLES_PER_SHARD) -> list[str]:
    """Goes on until the set is finished; the lines of progress."""
    lines: list[str] = []
    settings: dict[str, Any] = {"samples_per_shard": samples_per_shard, "image_format": ImageFormat.PNG}
    result = make_shards(
        MakeShardsConfig("folder", str(raw), str(output), classes="cityscapes", **settings), progress=lines.append
    )
    assert result.index is not None
    return lines


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("restart") / "raw", COUNT)


@pytest.fixture(scope="module")
def whole(raw: Path) -> dict[str, bytes]:
    """The bytes of an uninterrupted run of one worker."""
    assert main(command(raw, raw.parent / "whole", "--workers", "1")) == 0
    return content(raw.parent / "whole")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("many") / "raw", MANY)


@pytest.fixture(scope="module")
def whole_of_many(many: Path) -> dict[str, bytes]:
    assert main(command(many, many.parent / "whole", "--workers", "1", samples_per_shard=1)) == 0
    return content(many.parent / "whole")


def test_one_and_three_workers_write_the_same(raw: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert main(command(raw, tmp_path / "out", "--workers", "3")) == 0
    assert content(tmp_path / "out") == whole


def test_the_working_directory_and_the_clock_do_not_matter(raw: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    time.sleep(1.1)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONPATH": str(Path.cwd())}
    arguments = [sys.executable, "-m", "iccld", *command(raw, tmp_path / "out", "--workers", "1")]
    subprocess.run(arguments, check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert content(tmp_path / "out") == whole


def start(many: Path, output: Path, *options: str) -> "subprocess.Popen[bytes]":
    """A process that has finished some shards, and cannot finish all."""
    arguments = [sys.executable, "-m", "iccld", *command(many, output, *options, samples_per_shard=1)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    while process.poll() is None and len(list((output / "making").glob("*.json"))) < 20:
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_goes_on(
    many: Path, whole_of_many: dict[str, bytes], tmp_path: Path, number: signal.Signals, status: int, workers: int
) -> None:
    output = tmp_path / "out"
    process = start(many, output, "--workers", str(workers))
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    if number != signal.SIGKILL:
        assert errors.decode() == f"iccld shards make: stopped by {number.name}; the same command goes on\n"
    with pytest.raises(ValueError, match="not finished"):
        ShardIndex.open(output)
    shards = sorted((output / "making").glob("0*.json"))
    kept = {path: path.stat().st_mtime_ns for path in (output / f"shard-{shard.stem}.tar" for shard in shards)}
    lines = resume(many, output, samples_per_shard=1)
    assert content(output) == whole_of_many
    assert lines[0] == f"{len(kept)} of {MANY} shards are kept" and len(lines) == 1 + MANY - len(kept)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_only_one_at_a_time(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    process = start(many, output, "--workers", "1")
    before: dict[str, bytes] = {}
    while before != (now := content(output)):  # until the pipe is full, and it waits
        before = now
        time.sleep(1)
    assert main(command(many, output, samples_per_shard=1)) == 2
    assert f"{output}: another process is at work there; wait for it, or end it." in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert content(output) == before
    with pytest.raises(ValueError, match=r"made with other settings: samples_per_shard \(was 1, is 3\)"):
        make(many, output=str(output), samples_per_shard=3)


def break_off(raw: Path, output: Path) -> None:
    """Leaves all six shards finished, but not the set."""
    extra = raw / "images" / "zzz.png"
    extra.write_bytes(b"no image")
    assert main(command(raw, output, "--workers", "1")) == 1
    extra.unlink()
    settings = json.loads((output / "making" / "settings.json").read_text())
    keys = "\n".join(f"frame_{i:03d}" for i in range(COUNT))
    (output / "making" / "settings.json").write_text(json.dumps(settings | {"pairs": zlib.crc32(keys.encode())}))
    (output / "making" / "000006.json").unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: os.truncate(path, 1024)])
@pytest.mark.parametrize("name", ["shard-000002.tar", "making/000002.npy", "making/000002.json"])
def test_a_damaged_shard_is_made_again(
    raw: Path, whole: dict[str, bytes], tmp_path: Path, name: str, damage: Any
) -> None:
    output = tmp_path / "out"
    break_off(raw, output)
    damage(output / name)
    (output / "making" / "000003.123.tmp").write_bytes(b"half")
    lines = resume(raw, output)
    assert content(output) == whole
    assert lines[0] == "5 of 6 shards are kept" and lines[1].startswith("shard-000002.tar: 6 of 6, ")


def test_mended_pairs_are_read_again(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    spoil(raw)
    assert make(raw, samples_per_shard=2, bytes_per_shard=1).index is None
    write_folder(raw, 9)
    mended = make(raw, samples_per_shard=2, bytes_per_shard=1)
    assert not mended.problems and len(opened(mended)) == 9


def test_pairs_mended_before_the_others_are_accepted_are_taken(tmp_path: Path) -> None:
    raw, lines = write_folder(tmp_path / "raw", 6), list[str]()
    labels = [raw / "labels" / f"frame_{i:03d}.png" for i in (1, 2, 4)]
    mended = labels[0].read_bytes()
    for label in labels:
        label.unlink()
    config = MakeShardsConfig("folder", str(raw), str(tmp_path / "out"), classes="cityscapes", samples_per_shard=3)
    assert make_shards(config).index is None
    labels[0].write_bytes(mended)
    result = make_shards(replace(config, accept_bad=True), progress=lines.append)
    assert list(read_all(opened(result))) == [f"frame_{i:03d}" for i in (0, 1, 3, 5)]
    assert [Path(problem.file).name for problem in result.problems] == ["frame_002.png", "frame_004.png"]
    assert lines[0] == "1 of 2 shards are kept", "no bad pair of the second has changed"
    assert any(line.startswith("4 images were encoded anew") for line in lines), "of the shard that is kept, too"


@pytest.mark.parametrize("packed", [False, True])
def test_files_changed_before_it_goes_on_are_read_again(tmp_path: Path, packed: bool) -> None:
    raw, lines = write_folder(tmp_path / "raw", 4), list[str]()
    other, bad = raw / "labels" / "frame_000.png", raw / "labels" / "frame_003.png"
    old, new, last = other.read_bytes(), (raw / "labels" / "frame_001.png").read_bytes(), bad.read_bytes()
    assert old != new

    def give() -> IndexResult:
        given = Path(shutil.make_archive(str(raw), "zip", raw)) if packed else raw
        config = MakeShardsConfig(
            "folder", str(given), str(tmp_path / "out"), classes="cityscapes", samples_per_shard=1
        )
        return make_shards(config, progress=lines.append)

    bad.write_bytes(b"")
    assert give().index is None
    bad.write_bytes(last)
    other.write_bytes(new)
    index = opened(give())
    assert members(index, 0)[1] == members(index, 1)[1]
    assert "2 of 4 shards are kept" in lines


def test_a_list_of_classes_changed_before_it_goes_on_is_read_again(tmp_path: Path) -> None:
    raw, table, lines = write_folder(tmp_path / "raw", 2), tmp_path / "mine.yaml", list[str]()
    names = [f"class_{number}" for number in range(19)]
    ids = json.dumps({name: number for number, name in enumerate(names)} | {"void": 255})
    files = "images: 'images/{f}.png', labels: 'labels/{f}.png', labels_as: ids, class_list: list.json"
    table.write_text(f"{{{files}, ids: {ids}}}")
    config = MakeShardsConfig(str(table), str(raw), str(tmp_path / "out"), samples_per_shard=1)

    def give(listed: list[str]) -> IndexResult:
        listed = [*listed, *["void"] * (256 - len(listed))]
        (raw / "list.json").write_text(json.dumps({"labels": [{"name": name} for name in listed]}))
        return make_shards(config, progress=lines.append)

    bad = raw / "labels" / "frame_001.png"
    last = bad.read_bytes()
    bad.write_bytes(b"")
    assert give(names).index is None
    bad.write_bytes(last)
    opened(give(names[::-1]))
    assert not any("are kept" in line for line in lines), "the ids mean other classes now"


def test_shards_that_mending_leaves_over_are_removed(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 3)
    labels = [raw / "labels" / f"frame_{i:03d}.png" for i in range(3)]
    label = labels[2].read_bytes()
    labels[2].unlink()
    assert make(raw, bytes_per_shard=1).index is None
    assert len(list(Path(f"{raw}-shards").glob("*.tar"))) == 2
    labels[2].write_bytes(label)
    for missing in labels[:2]:
        missing.unlink()
    assert make(raw, bytes_per_shard=1).index is None
    index = opened(make(raw, bytes_per_shard=1, accept_bad=True))
    assert list(read_all(index)) == ["frame_002"]
    assert [path.name for path in Path(f"{raw}-shards").glob("*.tar")] == ["shard-000000-000.tar"]


def test_pairs_that_came_or_went_start_it_anew(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    spoil(raw)
    assert make(raw, samples_per_shard=2).index is None
    for i in (1, 2, 3, 4, 6, 7, 8):
        (raw / "images" / f"frame_{i:03d}.png").unlink()
    index = opened(make(raw, samples_per_shard=2))
    assert [index.shard_name(i) for i in range(len(index.shards))] == ["shard-000000.tar"]
    assert list(read_all(index)) == ["frame_000", "frame_005"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_loses_nothing_that_is_finished(
    raw: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=60k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        assert main(command(raw, disk / "out", "--workers", str(workers))) == AGAIN
        errors = capsys.readouterr().err
        assert errors.endswith(
            f"No space left on device: '{disk / 'out'}'; make room on that disk, and give the same command again\n"
        )
        finished = len(list((disk / "out" / "making").glob("*.json"))) - 1
        assert 1 <= finished < 6
        assert workers > 1 or not list((disk / "out").rglob("*.tmp")), "room is not wasted"
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        lines = resume(raw, disk / "out")
        assert lines[0] == f"{finished} of 6 shards are kept" and content(disk / "out") == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)
