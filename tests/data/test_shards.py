import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from iccld.data import shards as shards_module
from iccld.data.index import ShardIndex
from iccld.data.packing import ImageFormat, Packing
from iccld.data.reader import ShardReader
from iccld.data.shards import MakeShardsConfig, MakeShardsResult, main, make_shards
from tests.data.factory import make_set, random_pair, save, write_cityscapes, write_folder, write_gta5


def make(root: Path, **settings: Any) -> MakeShardsResult:
    defaults = {"dataset": "folder", "input": str(root), "output": f"{root}-shards", "image_format": ImageFormat.PNG}
    return make_shards(MakeShardsConfig(**defaults | settings), progress=lambda line: None)


def opened(result: MakeShardsResult) -> ShardIndex:
    assert result.index is not None
    return result.index


def read_all(index: ShardIndex, *, with_labels: bool = True) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    reader = ShardReader(index)
    return {index.key(i): reader.read(i, with_labels=with_labels) for i in range(len(index))}


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_webdataset_reads_what_we_write(tmp_path: Path, image_format: ImageFormat) -> None:
    index = opened(make(write_folder(tmp_path / "raw", 9), image_format=image_format, samples_per_shard=4))
    urls = [str(index.folder / shard.name) for shard in index.header.shards]
    extension = "jpg" if image_format is ImageFormat.JPG else "png"
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    samples = list(pipeline)
    assert [Path(url).name for url in urls] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [sample["__key__"] for sample in samples] == [index.key(i) for i in range(9)]
    for i, sample in enumerate(samples):
        assert {name for name in sample if not name.startswith("__")} == {extension, "label.png"}
        image, train_ids = random_pair(i)
        np.testing.assert_array_equal(sample["label.png"][..., 0], train_ids)
        if extension == "png":
            np.testing.assert_array_equal(sample["png"], image)


def test_gta5_and_cityscapes_go_through_their_converters(tmp_path: Path) -> None:
    game = opened(make(write_gta5(tmp_path / "gta5", 3), dataset="gta5"))
    write_cityscapes(tmp_path / "city", "train", 3, labels=False)
    write_cityscapes(tmp_path / "city", "val", 2)
    target = opened(
        make(tmp_path / "city", dataset="cityscapes", split="train", no_labels=True, output=str(tmp_path / "target"))
    )
    validation = opened(make(tmp_path / "city", dataset="cityscapes", split="val"))
    assert [index.header.has_labels for index in (game, target, validation)] == [True, False, True]
    np.testing.assert_array_equal(read_all(game)["00002"][1], random_pair(2)[1])  # type: ignore[arg-type]
    np.testing.assert_array_equal(read_all(validation)["city1_000001_000019"][0], random_pair(1)[0])
    assert len(read_all(target, with_labels=False)) == 3


def test_keys_are_safe_for_webdataset(tmp_path: Path) -> None:
    save(tmp_path / "raw" / "images" / "a.b" / "c d.1.png", random_pair(0)[0])
    index = opened(make(tmp_path / "raw", no_labels=True))
    assert index.key(0) == "a_b_c_d_1"
    save(tmp_path / "raw" / "images" / "a_b" / "c-d.png", random_pair(0)[0])
    save(tmp_path / "raw" / "images" / "a.b" / "c-d.png", random_pair(0)[0])
    with pytest.raises(ValueError, match=r"c-d.png and .*c-d.png get the same key 'a_b_c-d'; rename one"):
        make(tmp_path / "raw", no_labels=True, output=str(tmp_path / "other"))


def test_sizes(tmp_path: Path) -> None:
    packing = Packing("png", False, 95, True, 40, None)
    assert packing.size_of(100, 80) == (40, 32)
    assert packing.size_of(20, 40) == (20, 40), "never enlarged"
    raw = write_folder(tmp_path / "raw", 3)
    small = opened(make(raw, max_side=16, output=str(tmp_path / "small")))
    exact = opened(make(raw, height=48, width=16, output=str(tmp_path / "exact")))
    for i, (image, train_ids) in enumerate(read_all(small).values()):
        assert image.shape == (12, 16, 3) and train_ids is not None
        np.testing.assert_array_equal(train_ids, random_pair(i)[1][1::2, 1::2])
        means = random_pair(i)[0].reshape(12, 2, 16, 2, 3).mean((1, 3))
        assert np.corrcoef(image.ravel(), means.ravel())[0, 1] > 0.8, "antialiased, and aligned with the labels"
    assert {image.shape for image, _ in read_all(exact).values()} == {(48, 16, 3)}


def test_keep_copies_the_files_bytes(tmp_path: Path) -> None:
    index = opened(make(write_folder(tmp_path / "raw", 2, suffix=".jpg"), image_format=ImageFormat.KEEP))
    offset, size = int(index.samples["image_offset"][1]), int(index.samples["image_size"][1])
    data = (index.folder / "shard-000000.tar").read_bytes()[offset : offset + size]
    assert data == (tmp_path / "raw" / "images" / "frame_001.jpg").read_bytes()
    save(tmp_path / "raw" / "images" / "other.png", random_pair(0)[0])
    with pytest.raises(ValueError, match="--image-format keep: the images are jpg, png, but a set has one format"):
        make(tmp_path / "raw", image_format=ImageFormat.KEEP, output=str(tmp_path / "mixed"))


def spoil(root: Path) -> dict[str, str]:
    """Spoils four of the pairs 0-8; file name to what is to be said of it."""
    (root / "labels" / "frame_001.png").unlink()
    save(root / "labels" / "frame_002.png", np.zeros((8, 8), np.uint8))
    save(root / "labels" / "frame_003.png", np.full((24, 32), 77, np.uint8))
    image = root / "images" / "frame_004.png"
    image.write_bytes(image.read_bytes()[:300])
    label = root / "labels" / "frame_006.png"
    label.write_bytes(b"no image")
    return {
        "images/frame_001.png": "it has no label",
        "labels/frame_002.png": "the label has 8x8 pixels, its image 24x32; export the two in one size",
        "labels/frame_003.png": "ids that its data set or mapping does not define: [77]; correct it",
        "images/frame_004.png": "the image cannot be read",
        "labels/frame_006.png": "the label cannot be read",
    }


def assert_all_named(problems: list[str], expected: dict[str, str]) -> None:
    assert len(problems) == len(expected)
    for problem, (file, what) in zip(problems, expected.items(), strict=True):
        assert file in problem and what in problem and "--accept-bad" in problem


def test_bad_pairs_are_all_listed_and_left_out_if_accepted(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    expected = spoil(raw)
    refused = make(raw, samples_per_shard=2)
    assert refused.index is None
    assert_all_named([str(problem) for problem in refused.problems], expected)
    with pytest.raises(ValueError, match="the shards are not finished"):
        ShardIndex.open(f"{raw}-shards")
    accepted = make(raw, samples_per_shard=2, accept_bad=True)
    assert accepted.problems == refused.problems
    assert list(read_all(opened(accepted))) == [f"frame_{i:03d}" for i in (0, 5, 7, 8)]
    names = sorted(path.name for path in Path(f"{raw}-shards").iterdir())
    assert names == ["index", "shard-000000.tar", "shard-000002.tar", "shard-000003.tar", "shard-000004.tar"]


def test_mended_pairs_are_read_again(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    spoil(raw)
    assert make(raw, samples_per_shard=2).index is None
    write_folder(raw, 9)
    mended = make(raw, samples_per_shard=2)
    assert not mended.problems and len(opened(mended)) == 9


def test_a_set_of_bad_pairs_only_is_never_finished(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 2, labels=False)
    result = make(raw, accept_bad=True)
    assert result.index is None and len(result.problems) == 2


def test_a_finished_set_is_kept_and_other_settings_are_refused(tmp_path: Path) -> None:
    index = make_set(tmp_path, 5)
    config = {"output": str(index.folder), "samples_per_shard": 4}
    before = {path: path.stat().st_mtime_ns for path in index.folder.rglob("*")}
    lines: list[str] = []
    again = MakeShardsConfig("folder", str(tmp_path / "raw"), image_format=ImageFormat.PNG, **config)  # type: ignore[arg-type]
    make_shards(again, progress=lines.append)
    assert "is finished already with these settings: 5 samples are kept" in lines[0]
    assert before == {path: path.stat().st_mtime_ns for path in index.folder.rglob("*")}
    with pytest.raises(ValueError, match=r"made with other settings: max_side \(was 0, is 16\); use another --output"):
        make(tmp_path / "raw", **config, max_side=16)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    output = Path(f"{raw}-shards")
    packed: list[str] = []
    pack_shard = shards_module.pack_shard

    def interrupted(path: Path, *arguments: Any) -> Any:
        packed.append(path.name)
        if len(packed) == 3:
            path.with_name(f"{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return pack_shard(path, *arguments)

    monkeypatch.setattr(shards_module, "pack_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(raw, samples_per_shard=2)
    assert sorted(path.name for path in output.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(ValueError, match="not finished"):
        ShardIndex.open(output)
    with pytest.raises(ValueError, match="made with other settings: samples_per_shard"):
        make(raw, samples_per_shard=3)
    assert len(opened(make(raw, samples_per_shard=2))) == 9
    assert packed[3:] == ["shard-000002.tar", "shard-000003.tar", "shard-000004.tar"]
    assert not list(output.glob("*.tmp"))


def test_pairs_that_came_or_went_start_it_anew(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    spoil(raw)
    assert make(raw, samples_per_shard=2).index is None
    for i in (1, 2, 3, 4, 6, 7, 8):
        (raw / "images" / f"frame_{i:03d}.png").unlink()
    index = opened(make(raw, samples_per_shard=2))
    assert [shard.name for shard in index.header.shards] == ["shard-000000.tar"]
    assert list(read_all(index)) == ["frame_000", "frame_005"]


def test_folders_of_others_are_not_touched(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 2)
    save(Path(f"{raw}-shards") / "holiday.png", random_pair(0)[0])
    with pytest.raises(ValueError, match=r"is not empty and was not made by this command; use another --output"):
        make(raw)
    with pytest.raises(ValueError, match=r"--input .*nowhere: there is no such folder"):
        make(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "kitty"}, "--dataset kitty is unknown; use one of gta5, cityscapes, folder"),
        ({"dataset": "gta5", "mapping": "m.json"}, "--mapping m.json: the ids of gta5 are known; leave"),
        ({"max_side": -1}, "must be positive"),
        ({"height": 8}, "give --size as HEIGHTxWIDTH"),
        ({"max_side": 8, "height": 8, "width": 8}, "exclude each other"),
        ({"quality": 0}, "--quality 0 must be between 1 and 100"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0 must be at least 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MakeShardsConfig(**{"dataset": "folder", "input": "in", "output": "out"} | settings)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    command = ["--dataset", "folder", "--input", str(raw), "--output", str(tmp_path / "out"), "--size", "24x32"]
    assert main([*command[:-1], "24"]) == 2
    assert "error: --size 24 must be HEIGHTxWIDTH" in capsys.readouterr().err
    expected = spoil(raw)
    assert main(command) == 1
    errors = capsys.readouterr().err.splitlines()
    assert_all_named([line for line in errors if line.startswith("bad: ")], expected)
    assert "5 bad pairs" in errors[-1] and "is not finished" in errors[-1]
    assert main([*command, "--accept-bad"]) == 0
    assert "4 samples, 5 pairs left out" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "index" / "index.json").read_text())["settings"]
    assert (settings["height"], settings["image_format"], settings["quality"]) == (24, "jpg", 95)
    with Image.open(raw / "images" / "frame_000.png") as image:
        stored = read_all(ShardIndex.open(tmp_path / "out"))["frame_000"][0]
        assert np.abs(stored.astype(int).mean((0, 1)) - np.asarray(image).mean((0, 1))).max() < 8
