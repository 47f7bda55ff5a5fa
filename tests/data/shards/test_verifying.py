import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iccld.cli import main
from iccld.data.shards.indexing import build_index
from iccld.data.shards.verifying import verify_shards
from iccld.data.storage.index import ShardIndex
from tests.data.conftest import Site
from tests.data.factory import HEIGHT, WIDTH, make_set, pair_members, png, random_pair, write_index_anew, write_tar

SHARD, KEY, POSITION = "shard-000001.tar", "frame_005", 5


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """10 pairs in three shards."""
    return make_set(tmp_path_factory.mktemp("sound"), 10)


@pytest.fixture
def index(sound: ShardIndex, tmp_path: Path) -> ShardIndex:
    """A copy that may be broken."""
    shutil.copytree(sound.location, tmp_path / "set")
    return ShardIndex.open(tmp_path / "set")


def verify(index: ShardIndex, num_workers: int = 1) -> list[str]:
    result = verify_shards(index.location, num_workers=num_workers, progress=lambda line: None)
    return [str(problem).replace(f"{index.location}/", "") for problem in result.problems]


def overwrite(index: ShardIndex, kind: str, data: bytes) -> None:
    """Puts `data` in the place of a member of the sample at POSITION."""
    record = index.samples[POSITION]
    assert len(data) <= record[f"{kind}_size"]
    with (Path(index.location) / SHARD).open("r+b") as file:
        file.seek(int(record[f"{kind}_offset"]))
        file.write(data)


def change_index(index: ShardIndex, **values: object) -> None:
    """Writes another index, with other values for the sample at POSITION; its checksums fit."""
    samples = np.array(index.samples)
    for name, value in values.items():
        samples[name][POSITION] = value
    write_index_anew(index.folder, shards=np.array(index.shards), samples=samples)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_sound_set_has_no_problems(sound: ShardIndex, num_workers: int) -> None:
    lines: list[str] = []
    result = verify_shards(sound.location, num_workers=num_workers, progress=lines.append)
    assert (result.num_samples, result.num_bytes, result.problems) == (10, sound.header.num_bytes, [])
    assert len(lines) == 3 and ": 3 of 3, " in lines[-1] and lines[-1].endswith("0:00 left, 0 problems")


def test_a_set_without_labels_has_no_problems(tmp_path: Path) -> None:
    assert verify(make_set(tmp_path, 3, labels=False)) == []


def change_tar(index: ShardIndex, offset: int, data: bytes) -> None:
    """Overwrites bytes of the tar from `offset` on, counted from the start of the header of the sample at POSITION."""
    with (Path(index.location) / SHARD).open("r+b") as file:
        file.seek(int(index.samples["image_offset"][POSITION]) - 512 + offset)
        file.write(data)


def remove_end_mark(index: ShardIndex) -> None:
    path = Path(index.location) / SHARD
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(path.stat().st_size, b"\1"))


def change_header(index: ShardIndex, **values: object) -> None:
    path = index.folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BREAKS: dict[str, tuple[Callable[[ShardIndex], object], list[str]]] = {
    "image bytes": (
        lambda index: overwrite(index, "image", b"\0"),
        [f"{SHARD}: sample '{KEY}': its image is not what was indexed (checksum); restore it, or make it and"],
    ),
    "label bytes": (
        lambda index: overwrite(index, "label", b"\0"),
        [f"{SHARD}: sample '{KEY}': its label is not what was indexed (checksum)"],
    ),
    "missing shard": (
        lambda index: (Path(index.location) / SHARD).unlink(),
        [f"{SHARD}: it is missing; restore it"],
    ),
    "cut shard": (
        lambda index: os.truncate(Path(index.location) / SHARD, int(index.samples["image_offset"][7]) + 10),
        [f"{SHARD}: it has ", f"{SHARD}: sample 'frame_007': its index places it beyond the shard's"],
    ),
    "longer shard": (
        lambda index: (Path(index.location) / SHARD).open("ab").write(b"x"),
        [f"{SHARD}: it has 20481 bytes, its index says 20480"],
    ),
    "samples.npy": (
        lambda index: flip(index.folder / "samples.npy", -1),
        [
            "index/samples.npy: it is not what index.json says (checksum); restore it, or remove index/",
            "shard-000002.tar: sample 'frame_008': the tar has no members of this key where its index says",
        ],
    ),
    "classes.npy": (
        lambda index: flip(index.folder / "classes.npy", -4),
        ["index/classes.npy: it is not what index.json says (checksum)"],
    ),
    "place": (
        lambda index: change_index(index, image_offset=10**6),
        [f"{SHARD}: sample '{KEY}': its index places it beyond the shard's 20480 bytes"],
    ),
    "size": (
        lambda index: change_index(index, height=7),
        [f"{SHARD}: sample '{KEY}': it has {HEIGHT}x{WIDTH} pixels, its index says 7x{WIDTH}"],
    ),
    "class pixels": (
        lambda index: change_index(index, class_pixels=3),
        [f"{SHARD}: sample '{KEY}': its label has other class pixels than its index says"],
    ),
    "member header": (
        lambda index: change_tar(index, 0, b"other"),
        [f"{SHARD}: it is no whole, uncompressed tar: cut off or damaged from byte "],
    ),
    "empty member header": (
        lambda index: change_tar(index, 0, bytes(512)),
        [f"{SHARD}: 15872 bytes follow its end mark, from byte 4608 on"],
    ),
    "end mark": (
        remove_end_mark,
        [f"{SHARD}: it is no whole, uncompressed tar: cut off or damaged from byte "],
    ),
    "key": (
        lambda index: change_index(index, key=b"frame_555"),
        [f"{SHARD}: sample 'frame_555': the tar has no members of this key where its index says; restore it, or make"],
    ),
    **{
        f"total of {name}": (
            lambda index, name=name, change=change: change_header(index, **{name: change(getattr(index.header, name))}),
            [f"index/index.json: its {name} is not that of samples.npy; restore it, or remove index/"],
        )
        for name, change in {
            "num_bytes": lambda total: total + 1,
            "has_labels": lambda total: not total,
            "min_size": lambda size: [size[0], size[1] - 1],
            "max_size": lambda size: [size[0] + 1, size[1]],
            "class_pixels": lambda counts: [counts[0] + 1, *counts[1:]],
            "class_samples": lambda counts: counts[::-1],  # of the same sum, which opening a set checks
        }.items()
    },
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_broken_is_named(index: ShardIndex, what: str) -> None:
    spoil, expected = BREAKS[what]
    spoil(index)
    problems = verify(index)
    assert len(problems) == len(expected), problems
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)


def test_what_the_disk_does_not_give_is_named(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("iccld.data.shards.verifying.read_members", fail)
    assert verify(index)[1].startswith(f"{SHARD}: it cannot be read (Input/output error); restore it")


def test_all_that_is_broken_is_named_in_order(index: ShardIndex) -> None:
    BREAKS["image bytes"][0](index)
    BREAKS["classes.npy"][0](index)
    (Path(index.location) / "shard-000000.tar").unlink()
    problems = verify(index, num_workers=3)
    assert [problem.partition(":")[0] for problem in problems] == ["index/classes.npy", "shard-000000.tar", SHARD]


@pytest.mark.parametrize(
    ("kind", "member", "what"),
    [
        ("image", png(random_pair(0)[0])[:300], "the image cannot be decoded"),
        ("label", png(np.zeros((8, 8), np.uint8)), "the label has 8x8 pixels, its image 24x32"),
        ("label", png(np.full((24, 32), 77, np.uint8)), "the label holds 77; labels must hold train ids"),
        ("label", b"no image", "the label cannot be decoded"),
    ],
)
def test_bytes_that_were_indexed_as_they_are_must_be_usable(
    index: ShardIndex, kind: str, member: bytes, what: str
) -> None:
    overwrite(index, kind, member)
    change_index(index, **{f"{kind}_size": len(member), f"{kind}_checksum": zlib.crc32(member)})
    problems = verify(index)
    assert len(problems) == 1 and f"{SHARD}: sample '{KEY}': {what}" in problems[0]


def test_tars_of_others_are_verified(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pair_members("x", 0) | {"x.json": b"{}"} | pair_members("y", 1))
    write_tar(tmp_path / "b.tar", {"empty.txt": b""} | pair_members("z", 2))
    assert build_index(tmp_path, accept_bad=True).index is not None
    assert verify(ShardIndex.open(tmp_path)) == []


def test_the_command(index: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "verify", index.location, "--workers", "1"]) == 0
    megabytes = f"{index.header.num_bytes / 1e6:,.1f}"
    assert capsys.readouterr().out.endswith(f"{index.location}: 10 samples, {megabytes} MB: all as indexed.\n")
    BREAKS["image bytes"][0](index)
    assert main(["shards", "verify", index.location, "--workers", "2"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"broken: {index.location}/{SHARD}: sample '{KEY}': its image is not")
    assert captured.out.endswith("MB: 1 problems.\n")
    assert main(["shards", "verify", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_set_on_a_web_server(
    index: ShardIndex, nginx: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = tmp_path.name
    shutil.copytree(index.location, nginx.folder / name)
    url, lines = f"{nginx.url}/{name}", list[str]()
    assert verify_shards(url, num_workers=num_workers, progress=lines.append).problems == []
    assert len(lines) == 3
    BREAKS["label bytes"][0](ShardIndex.open(nginx.folder / name))
    (nginx.folder / name / "shard-000002.tar").unlink()
    problems = verify_shards(url, num_workers=num_workers, progress=lines.append).problems
    assert [str(problem).partition(";")[0] for problem in problems] == [
        f"{url}/{SHARD}: sample '{KEY}': its label is not what was indexed (checksum)",
        f"{url}/shard-000002.tar: it is missing",
    ]
