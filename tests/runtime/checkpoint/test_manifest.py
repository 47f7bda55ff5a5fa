"""A manifest that a stranger or a disk has changed is named, and reads nothing outside its folder."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from iccld.durable import file_checksum
from iccld.runtime.checkpoint.errors import CheckpointError, DamagedError, ForeignFormatError
from iccld.runtime.checkpoint.manifest import verify, write_manifest
from tests.runtime.checkpoint.factory import save, store


def test_no_bit_of_a_manifest_can_be_flipped_unseen(tmp_path: Path):
    path = save(store(tmp_path), 1) / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedError, match=r"damaged: manifest\.json"):
            verify(path.parent)


def hostile_manifests() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield manifests that a stranger, or a disk, may leave."""
    texts = {
        "nested": "[" * 100_000,
        "nested in part": '{"sha256": "", "files": ' + '{"a":' * 100_000 + "1" + "}" * 100_001,
        "less nested": json.dumps({"a": 1}).replace("1", "[" * 900 + "]" * 900),
        "not JSON": "{",
        "a list": "[]",
        "not text": "\udcff",
        "a large number": '{"step": 1' + "0" * 5000 + "}",
    }
    for name, text in texts.items():
        yield name, lambda path, text=text: path.write_bytes(text.encode(errors="surrogateescape"))
    yield "a folder", lambda path: (path.unlink(), path.mkdir())
    yield "a pipe", lambda path: (path.unlink(), os.mkfifo(path))
    yield "a link", lambda path: path.rename(path.with_name("other")) and path.symlink_to("other")
    for key in ("step", "files", "tensors"):
        for value in (None, [], {}, "x", -1, 1.5, {"a": 1}, {"a": {"size": 1}}, {"a": []}, [[]]):
            if (key, value) not in (("tensors", {}),):
                yield f"{key}={value}", lambda path, key=key, value=value: rewrite(path, {key: value})
    for layout in (None, [], {}, {"engine": "ddp"}, {"engine": 1, "world_size": 1}):
        yield f"layout={layout}", lambda path, layout=layout: rewrite(path, {"layout": layout})
    yield "stage=None", lambda path: rewrite(path, {"stage": None})
    facts = {"size": 8, "sha256": ""}
    for name in ("/etc/passwd", "../step_00000001/rank_00000.safetensors", "..", "", "a/b", "a\0b"):
        yield f"file {name!r}", lambda path, name=name: rewrite(path, {"files": {name: facts}, "tensors": {}})
    entry = {"shape": [1], "dtype": "float32", "pieces": [["rank_00000.safetensors", 0, 1]]}
    for change in (
        {"pieces": [["../other.safetensors", 0, 1]]},
        {"pieces": [[7, 0, 1]]},
        {"pieces": [["rank_00000.safetensors", -1, 1]]},
        {"pieces": [0]},
        {"dtype": "__class__"},
        {"shape": [True]},
        {"shape": [2]},
        {"pieces": []},
        {"shape": [2], "pieces": [["rank_00000.safetensors", 1, 2]]},
        {"shape": [1 << 40], "pieces": [["rank_00000.safetensors", 0, 1 << 40]]},
        {"shape": [1 << 52, 1 << 52], "pieces": []},
        {"shape": [1] * 65},
    ):
        yield f"{change}", lambda path, change=change: rewrite(path, {"tensors": {"a": entry | change}})


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """Rewrite the manifest with a valid checksum, as an attacker would."""
    facts = json.loads(path.read_text())
    write_manifest(path.parent, {name: value for name, value in (facts | change).items() if name != "sha256"})


HOSTILE = dict(hostile_manifests())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_named_and_the_older_checkpoint_is_used(tmp_path: Path, name: str):
    reports: list[str] = []
    checkpoints = store(tmp_path, reports)
    for step in (1, 2):
        save(checkpoints, step)
    HOSTILE[name](tmp_path / "step_00000002" / "manifest.json")
    newest = checkpoints.newest()
    assert newest and newest.step == 1
    assert len(reports) == 1 and "step_00000002" in reports[0] and "\n" not in reports[0]
    checkpoints = store(tmp_path, reports)
    for step in (3, 4):
        save(checkpoints, step)


@pytest.mark.parametrize("form", ["../elsewhere", "{}/elsewhere", "./elsewhere"])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path, form: str):
    """A file outside is refused even if it is there with the right size and checksum."""
    folder, name = save(store(tmp_path), 1), form.format(tmp_path)
    (folder / name).write_bytes(b"elsewhere")
    facts = {"size": 9, "sha256": file_checksum(folder / name)}
    rewrite(folder / "manifest.json", {"files": {name: facts}, "tensors": {}})
    with pytest.raises(DamagedError, match="for a file's name, which would lie elsewhere"):
        verify(folder)


@pytest.mark.parametrize("target", ["same", "other"])
def test_a_link_in_a_checkpoint_is_damage(tmp_path: Path, target: str):
    """A link is damage even if the bytes are the same: its target may change, or go."""
    folder = save(store(tmp_path / "a"), 1)
    file = folder / "rank_00000.safetensors"
    elsewhere = file.rename(tmp_path / "elsewhere")
    file.symlink_to(elsewhere if target == "same" else "/dev/null")
    with pytest.raises(DamagedError, match=r"rank_00000\.safetensors is a link"):
        verify(folder)


def test_another_format_is_refused_and_kept(tmp_path: Path):
    """An older version must not resume an older step over a newer version's work."""
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    folder = save(checkpoints, 2)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ForeignFormatError, match="has format 99, and this version of iccld reads 2"):
        verify(folder)
    with pytest.raises(CheckpointError, match="has format 99"):
        checkpoints.newest()
    assert folder.is_dir()
