"""Several processes are told to make, or to index, the same set at once."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from iccld.data.shards import indexing
from iccld.data.shards.making import MakeShardsConfig, make_shards
from iccld.data.shards.packing import ImageFormat
from iccld.data.shards.work_folder import alone_in
from tests.data.factory import make_set, opened, pair_members, png, random_pair, write_folder, write_tar
from tests.data.shards.test_making import make, read_all
from tests.data.shards.test_restart import content


def test_who_is_let_in_after_another_has_finished_keeps_its_shards(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 3)
    write_folder(tmp_path / "spare", 4)
    shutil.copy(tmp_path / "spare" / "labels" / "frame_003.png", raw / "labels")
    how = {"classes": "cityscapes", "image_format": ImageFormat.PNG}
    config, lines = MakeShardsConfig("folder", str(raw), str(tmp_path / "out"), **how), []

    def progress(line: str) -> None:
        if "belong to no image" in line:  # said just before the lock is asked for
            make(raw, output=config.output)
            lines.append(content(Path(config.output)))
        lines.append(line)

    index = opened(make_shards(config, progress=progress))
    before, _, said = lines
    assert "is finished already with these settings: 3 samples are kept" in said
    assert content(Path(config.output)) == before and len(read_all(index)) == 3


def test_an_index_that_another_has_built_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", pair_members("x", 0))

    @contextmanager
    def late(folder: Path, name: str) -> Iterator[Path]:
        monkeypatch.setattr(indexing, "alone_in", alone_in)
        indexing.build_index(folder, progress=lambda line: None)
        with alone_in(folder, name) as work:
            yield work

    monkeypatch.setattr(indexing, "alone_in", late)
    with pytest.raises(ValueError, match="index is there already; remove it to build it anew"):
        indexing.build_index(tmp_path, progress=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "index"]


def test_what_is_at_work_in_a_finished_set_is_not_removed(tmp_path: Path) -> None:
    index = make_set(tmp_path, 3)
    folder = Path(index.location)
    with alone_in(folder, "making") as making:
        (making / "settings.json").write_text("{}")
        with pytest.raises(ValueError, match="another process is at work there"):
            make(tmp_path / "raw", output=str(folder), samples_per_shard=4)
        assert (making / "settings.json").is_file()
    make(tmp_path / "raw", output=str(folder), samples_per_shard=4)
    assert sorted(path.name for path in folder.iterdir()) == ["index", "shard-000000.tar"], "left over by a killed one"


def test_a_lock_on_a_removed_folder_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, seen = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not seen:
            shutil.rmtree(tmp_path / "work")
        flock(file, how)
        seen.append(file)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone_in(tmp_path, "work") as work:
        assert (work / "lock").is_file() and len(seen) == 2
        with pytest.raises(ValueError, match="another process is at work there"), alone_in(tmp_path, "work"):
            pass
        assert work.is_dir()
    assert not work.exists()


def test_sides_that_a_format_cannot_store_are_bad_pairs(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    image = random_pair(0, height=2, width=16_384)[0]
    (raw / "images" / "wide.png").write_bytes(png(image))
    (raw / "images" / "x.png").write_bytes(png(random_pair(0)[0]))
    result = make(raw, no_labels=True, image_format=ImageFormat.WEBP)
    assert result.index is None and len(result.problems) == 1
    what = "wide.png: it would have 2x16384 pixels, of which a side may have 16383 in webp; use --max-side or"
    assert what in str(result.problems[0])
    assert len(opened(make(raw, no_labels=True, output=str(tmp_path / "png")))) == 2, "of PNG it may be"
