"""Promises of `iccld.durable`: whole files, no link followed, rights by the umask, no stranger's file deleted."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from iccld.durable import (
    NotOursError,
    clear_away,
    create,
    holds_only,
    is_plain_name,
    locked,
    make_folder,
    open_lock,
    open_to_append,
    open_to_read,
    refuse_links,
    remove_left_overs,
    remove_tree,
    replacing,
    replacing_by_name,
    scratch_folder,
    walk,
    write_whole,
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Somebody's folder; whatever a test does, it stays as it is."""
    home = tmp_path / "home"
    (home / "folder").mkdir(parents=True)
    for name in ("file", "folder/file"):
        (home / name).write_text("precious")
    before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_text()) for path in [home, *home.rglob("*")]}
    yield home
    assert before == {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_text()) for path in [home, *home.rglob("*")]
    }


def plant(path: Path, home: Path, kind: str) -> None:
    if kind == "hard link":
        path.hardlink_to(home / "file")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(home / kind)


KINDS = ("file", "folder", "absent", "hard link", "pipe")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_takes_the_place_of_a_link(tmp_path: Path, home: Path, kind: str):
    path = tmp_path / "given"
    plant(path, home, kind)
    write_whole(path, "own")
    assert path.read_text() == "own" and not path.is_symlink() and path.stat().st_nlink == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opening", [open_to_append, open_lock, create, open_to_read])
def test_opening_follows_no_link_and_waits_for_no_pipe(
    tmp_path: Path, home: Path, kind: str, opening: Callable[[Path], Any]
):
    path = tmp_path / "given"
    plant(path, home, kind)
    if kind == "hard link" and opening is open_to_append:
        with open_to_append(path) as file:
            file.write(b" and own")
        assert path.read_text() == "precious and own"
    elif kind == "hard link" and opening is open_to_read:
        os.close(open_to_read(path))
    else:
        error = FileExistsError if opening is create else NotOursError
        with pytest.raises(error, match="given"):
            opening(path)


def test_a_link_is_named_with_where_it_leads_and_the_remedy(tmp_path: Path, home: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stage1").symlink_to(home / "folder")
    for act in (make_folder, refuse_links):
        with pytest.raises(
            NotOursError, match=r"run/stage1 is a link to .*/home/folder; .*make .*/run itself the link"
        ):
            act(tmp_path / "run" / "stage1" / "checkpoints", within=tmp_path / "run")
    with pytest.raises(NotOursError, match="stage1 is a link"):
        remove_tree(tmp_path / "run" / "stage1")


def test_the_users_own_path_may_lead_anywhere(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    make_folder(tmp_path / "run" / "stage1" / "checkpoints", within=tmp_path / "run")
    assert (tmp_path / "disk" / "stage1" / "checkpoints").is_dir()


def test_a_deleted_folder_takes_its_links_with_it_and_nothing_else(tmp_path: Path, home: Path):
    (tmp_path / "ours").mkdir()
    for kind in KINDS:
        plant(tmp_path / "ours" / kind, home, kind)
    remove_tree(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", [*KINDS, "foreign folder"])
def test_scratch_folders_are_new_and_what_is_not_ours_stays(tmp_path: Path, home: Path, kind: str):
    stray = tmp_path / "final.tmp"
    if kind == "foreign folder":
        stray.mkdir()
    else:
        plant(stray, home, kind)
    scratch = scratch_folder(tmp_path / "final", is_ours=lambda folder: False)
    assert scratch != stray and os.path.lexists(stray) and not list(scratch.iterdir())


def test_a_torn_scratch_folder_is_removed(tmp_path: Path):
    (tmp_path / "final.tmp" / "half").mkdir(parents=True)
    for name in ("whole.json", ".whole.json.0123abcd.tmp"):
        (tmp_path / "final.tmp" / "half" / name).write_text("")
    (tmp_path / "final.0123abcd.tmp").mkdir()
    (tmp_path / "final.backup.tmp").mkdir()
    assert scratch_folder(tmp_path / "final", is_ours=holds_only(r"half/whole\.json")) == tmp_path / "final.tmp"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final.backup.tmp", "final.tmp"]


def test_what_cannot_be_removed_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise PermissionError

    (tmp_path / "final.tmp").mkdir()
    (torn := tmp_path / ".a.json.0123abcd.tmp").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", fail)
        patched.setattr(Path, "unlink", fail)
        scratch = scratch_folder(tmp_path / "final", is_ours=lambda folder: True)
        remove_left_overs(tmp_path)
    assert scratch != tmp_path / "final.tmp" and scratch.is_dir() and torn.exists()
    assert clear_away(scratch) == "" and not scratch.exists()


@pytest.mark.parametrize("name", ["mine/thesis.txt", "thesis.txt", "a.json.txt", ".a.json.tmp", "half/a.json"])
def test_a_folder_with_a_file_that_we_do_not_write_is_left(tmp_path: Path, name: str):
    for folder in ("final.tmp", "final.0123abcd.tmp"):
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_text("precious")
        (tmp_path / folder / "a.json").write_text("")
    scratch = scratch_folder(tmp_path / "final", is_ours=holds_only(r"a\.json"))
    assert not list(scratch.iterdir()) and len(list(tmp_path.iterdir())) == 3
    assert [(tmp_path / folder / name).read_text() for folder in ("final.tmp", "final.0123abcd.tmp")] == [
        "precious"
    ] * 2


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, mode: int):
    import torch

    before = os.umask(umask)
    try:
        write_whole(tmp_path / "whole", "")
        with replacing(tmp_path / "replaced") as file:
            file.write(b"")
        with replacing_by_name(tmp_path / "model.safetensors") as name:
            save_file({"a": torch.zeros(1)}, name)
        open_to_append(tmp_path / "appended").close()
        os.close(open_lock(tmp_path / "lock"))
        with locked(tmp_path / "waited for"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 6 and set(modes.values()) == {mode}, modes


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path):
    write_whole(tmp_path / "a", "old")
    for way in (replacing, replacing_by_name):
        with pytest.raises(OSError, match="full"), way(tmp_path / "a"):
            raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_left_overs_of_a_crash_are_removed_and_nothing_else(tmp_path: Path, home: Path):
    ours, others = [".a.json.0123abcd.tmp", ".b.0123abcd.tmp"], [".a.txt.tmp", "a.0123abcd.tmp", ".linked.0123abcd.tmp"]
    for name in (*ours, *others[:2]):
        (tmp_path / name).write_text("half")
    (tmp_path / others[2]).symlink_to(home / "file")
    remove_left_overs(tmp_path, older_than_s=3600)
    remove_left_overs(tmp_path, of="b")
    assert {path.name for path in tmp_path.iterdir()} == {*ours[:1], *others, "home"}
    remove_left_overs(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "home"}


def test_names_that_lead_elsewhere_are_not_plain():
    for name in ("", ".", "..", "/etc/passwd", "a/b", "../a", "a\0b", "a\nb", 7, None):
        assert not is_plain_name(name)
    assert is_plain_name("rank_00000.safetensors") and is_plain_name(json.loads('"ü.json"'))


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path):
    name = "ü" * 127
    write_whole(tmp_path / name, "own")
    assert (tmp_path / name).read_text() == "own"


def test_a_folder_that_cannot_be_listed_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a/closed").mkdir(parents=True)
    (tmp_path / "a/b.json").touch()
    assert holds_only(r"b\.json")(tmp_path / "a")
    scandir = os.scandir

    def listing(path: Any = ".") -> Any:  # rights do not bind root, who may run this
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    assert not holds_only(r"b\.json")(tmp_path / "a")
    with pytest.raises(PermissionError):
        list(walk(tmp_path / "a"))
