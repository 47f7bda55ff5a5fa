import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from iccld.data.images.decode import decode_image, decode_label
from iccld.data.shards.indexing import IndexResult, build_index
from iccld.data.shards.making import MakeShardsConfig, make_shards
from iccld.data.shards.packing import ImageFormat, Packing
from iccld.data.storage.index import ShardIndex
from tests.data.factory import make_set, members, opened, random_pair, save, write_cityscapes, write_folder, write_gta5


def make(root: Path, *, progress: Callable[[str], None] = lambda line: None, **settings: Any) -> IndexResult:
    defaults = {"dataset": "folder", "input": str(root), "output": f"{root}-shards", "image_format": ImageFormat.PNG}
    defaults |= {"classes": "cityscapes"} if defaults["dataset"] == "folder" and "mapping" not in settings else {}
    return make_shards(MakeShardsConfig(**defaults | settings), progress=progress)


def read_all(index: ShardIndex) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    found = {index.key(i): members(index, i) for i in range(len(index))}
    return {key: (decode_image(image), decode_label(label) if label else None) for key, (image, label) in found.items()}


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_webdataset_reads_what_we_write(tmp_path: Path, image_format: ImageFormat) -> None:
    index = opened(make(write_folder(tmp_path / "raw", 9), image_format=image_format, samples_per_shard=4))
    urls = [str(Path(index.location) / index.shard_name(i)) for i in range(index.header.num_shards)]
    extension = "png" if image_format is ImageFormat.KEEP else image_format.value
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [Path(url).name for url in urls] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [sample["__key__"] for sample in samples] == [index.key(i) for i in range(9)]
    for i, sample in enumerate(samples):
        assert {name for name in sample if not name.startswith("__")} == {extension, "label.png"}
        image, train_ids = random_pair(i)
        np.testing.assert_array_equal(sample["label.png"][..., 0], train_ids)
        if extension != "jpg":
            np.testing.assert_array_equal(sample[extension], image)


@pytest.mark.parametrize("settings", [{}, {"bytes_per_shard": 20_000}, {"no_labels": True, "max_side": 9}])
def test_the_index_equals_that_of_reading_the_tars_again(tmp_path: Path, settings: dict[str, Any]) -> None:
    index = opened(make(write_folder(tmp_path / "raw", 9), samples_per_shard=5, accept_bad=True, **settings))
    written = {path.name: path.read_bytes() for path in index.folder.glob("*.npy")}
    index.folder.rename(tmp_path / "written")
    opened(build_index(index.location, progress=lambda line: None))
    assert written == {path.name: path.read_bytes() for path in index.folder.glob("*.npy")}


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
    assert len(read_all(target)) == 3


def test_keys_are_safe_for_webdataset(tmp_path: Path) -> None:
    save(tmp_path / "raw" / "images" / "a.b" / "c d.1.png", random_pair(0)[0])
    index = opened(make(tmp_path / "raw", no_labels=True))
    assert index.key(0) == "a_b_c_d_1"
    save(tmp_path / "raw" / "images" / "a_b" / "c-d.png", random_pair(1)[0])
    save(tmp_path / "raw" / "images" / "a.b" / "c-d.png", random_pair(2)[0])
    images = read_all(opened(make(tmp_path / "raw", no_labels=True, output=str(tmp_path / "alike"))))
    assert list(images) == ["a_b_c_d_1", "a_b_c-d-386a9932", "a_b_c-d-727542ad"], "the same each time"
    np.testing.assert_array_equal(images["a_b_c-d-727542ad"][0], random_pair(1)[0])
    save(tmp_path / "raw" / "images" / "a_b" / "c-d.webp", random_pair(0)[0])
    with pytest.raises(ValueError, match=r"c-d.png and .*c-d.webp get the same key 'a_b_c-d.*'; rename one"):
        make(tmp_path / "raw", no_labels=True, output=str(tmp_path / "other"))


def test_sizes(tmp_path: Path) -> None:
    packing = Packing(ImageFormat.PNG, max_side=40)
    assert packing.size_of(100, 80) == (40, 32)
    assert packing.size_of(20, 40) == (20, 40), "never enlarged"
    raw = write_folder(tmp_path / "raw", 3)
    small = opened(make(raw, max_side=16, output=str(tmp_path / "small")))
    exact = opened(make(raw, height=48, width=16, output=str(tmp_path / "exact")))
    assert exact.header.min_size == exact.header.max_size == [48, 16]
    for i, (image, train_ids) in enumerate(read_all(small).values()):
        assert image.shape == (12, 16, 3) and train_ids is not None
        np.testing.assert_array_equal(train_ids, random_pair(i)[1][1::2, 1::2])
        means = random_pair(i)[0].reshape(12, 2, 16, 2, 3).mean((1, 3))
        assert np.corrcoef(image.ravel(), means.ravel())[0, 1] > 0.8, "antialiased, and aligned with the labels"
    assert {image.shape for image, _ in read_all(exact).values()} == {(48, 16, 3)}


def test_keep_copies_the_files_bytes_of_any_format(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for i, suffix in enumerate((".jpg", ".png", ".webp")):
        save(raw / "images" / f"frame_{i}{suffix}", random_pair(i)[0])
        save(raw / "labels" / f"frame_{i}.png", random_pair(i)[1])
    (raw / "images" / "frame_3.png").write_bytes((raw / "images" / "frame_0.jpg").read_bytes())
    save(raw / "labels" / "frame_3.png", random_pair(3)[1])
    index = opened(make(raw, image_format=ImageFormat.KEEP))
    for i, name in enumerate(("frame_0.jpg", "frame_1.png", "frame_2.webp", "frame_0.jpg")):
        assert members(index, i)[0] == (raw / "images" / name).read_bytes()
    with tarfile.open(Path(index.location) / "shard-000000.tar") as tar:
        names = [name for name in tar.getnames() if "label" not in name]
    assert names == ["frame_0.jpg", "frame_1.png", "frame_2.webp", "frame_3.jpg"], "a suffix that lies is corrected"
    smaller = make(raw, image_format=ImageFormat.KEEP, max_side=16, output=str(tmp_path / "smaller"))
    assert {image.shape for image, _ in read_all(opened(smaller)).values()} == {(12, 16, 3)}


@pytest.mark.parametrize(
    ("image_format", "max_side", "count"),
    [("jpg", 0, 3), ("jpg", 16, 3), ("png", 16, 0), ("webp", 0, 0), ("keep", 0, 0), ("keep", 16, 1)],
)
def test_images_that_lose_by_being_encoded_anew_are_counted(
    tmp_path: Path, image_format: str, max_side: int, count: int
) -> None:
    raw, lines = write_folder(tmp_path / "raw", 2, labels=False), list[str]()
    save(raw / "images" / "a.jpg", random_pair(0)[0])
    how = {"image_format": ImageFormat(image_format), "max_side": max_side, "no_labels": True, "quality": 80}
    make(raw, progress=lines.append, **how)
    what = "images were encoded anew as JPEGs of quality 80, with some loss (--image-format png or webp loses nothing,"
    said = [line for line in lines if "encoded" in line]
    assert len(said) == bool(count) and all(line.startswith(f"{count} {what}") for line in said)


def test_shards_are_closed_by_bytes_too(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    limit = 20_480
    index = opened(make(raw, samples_per_shard=6, bytes_per_shard=limit))
    names = [index.shard_name(i) for i in range(index.header.num_shards)]
    assert names == [f"shard-00000{chunk}-00{part}.tar" for chunk, part in ((0, 0), (0, 1), (1, 0))]
    assert (index.shards["size"] <= limit).all()
    assert list(read_all(index)) == [f"frame_{i:03d}" for i in range(9)]
    tiny = opened(make(raw, bytes_per_shard=1, output=str(tmp_path / "tiny")))
    assert tiny.header.num_shards == 9, "a sample larger than the limit is alone"


def test_headers_of_long_names_count_in_the_limit_of_bytes(tmp_path: Path) -> None:
    raw, folder = write_folder(tmp_path / "raw", 20), "a" * 99
    for kind in ("images", "labels"):
        (raw / kind).rename(tmp_path / folder)
        (raw / kind).mkdir()
        (tmp_path / folder).rename(raw / kind / folder)
    limit = 30_720
    index = opened(make(raw, bytes_per_shard=limit))
    assert len(index) == 20 and len(index.key(0)) > 100
    assert (index.shards["size"] <= limit).all()


def spoil(root: Path) -> dict[str, str]:
    """Spoils five of the pairs 0-8; file name to what is to be said of it."""
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
        "labels/frame_003.png": "[77]; correct it",
        "images/frame_004.png": "the image cannot be read",
        "labels/frame_006.png": "the label cannot be read",
    }


def assert_all_named(problems: list[str], expected: dict[str, str]) -> None:
    assert len(problems) == len(expected)
    for problem, (file, what) in zip(problems, expected.items(), strict=True):
        assert file in problem and what in problem and "--accept-bad" in problem


@pytest.mark.parametrize("num_workers", [1, 3])
def test_bad_pairs_are_all_listed_and_left_out_if_accepted(tmp_path: Path, num_workers: int) -> None:
    raw = write_folder(tmp_path / "raw", 9)
    expected = spoil(raw)
    refused = make(raw, samples_per_shard=2, num_workers=num_workers)
    assert refused.index is None
    assert_all_named([str(problem) for problem in refused.problems], expected)
    with pytest.raises(ValueError, match="the shards are not finished"):
        ShardIndex.open(f"{raw}-shards")
    accepted = make(raw, samples_per_shard=2, accept_bad=True)
    assert accepted.problems == refused.problems
    assert list(read_all(opened(accepted))) == [f"frame_{i:03d}" for i in (0, 5, 7, 8)]
    names = sorted(path.name for path in Path(f"{raw}-shards").iterdir())
    assert names == ["index", "shard-000000.tar", "shard-000002.tar", "shard-000003.tar", "shard-000004.tar"]


def test_gta5_pairs_of_different_size_are_listed(tmp_path: Path) -> None:
    raw = write_gta5(tmp_path / "gta5", 4)
    save(raw / "images" / "00002.png", random_pair(2, height=24, width=40)[0])
    result = make(raw, dataset="gta5", accept_bad=True)
    assert_all_named(
        [str(problem) for problem in result.problems],
        {"labels/00002.png": "the label has 24x32 pixels, its image 24x40"},
    )
    assert list(read_all(opened(result))) == ["00000", "00001", "00003"]


def test_a_pair_beyond_memory_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_folder(tmp_path / "raw", 3)

    def exhausted(data: bytes) -> np.ndarray:
        if data == (raw / "images" / "frame_001.png").read_bytes():
            raise MemoryError
        return decode_image(data)

    monkeypatch.setattr("iccld.data.shards.packing.decode_image", exhausted)
    expected = {"images/frame_001.png": "memory does not suffice for it; use fewer --workers"}
    assert_all_named([str(problem) for problem in make(raw).problems], expected)


def test_a_set_of_bad_pairs_only_is_never_finished(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 2)
    for path in (raw / "labels").iterdir():
        path.write_bytes(b"no image")
    result = make(raw, accept_bad=True)
    assert result.index is None and len(result.problems) == 2


def test_images_without_any_label_are_refused_once_and_the_right_flag_goes_on(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 2, labels=False)
    with pytest.raises(ValueError, match=r"none of its 2 images has a label \(expected: .*\); add --no-labels"):
        make(raw, accept_bad=True)
    first = next(path.stem for path in sorted((raw / "images").iterdir()))
    (raw / "labels").mkdir(exist_ok=True)
    (raw / "labels" / f"{first}.json").write_text("{}")
    with pytest.raises(ValueError, match=r"its labels are JSON, as .*: --classes FILE.yaml, with labels_as: polygons"):
        make(raw)
    assert len(opened(make(raw, no_labels=True))) == 2


def test_a_finished_set_is_kept_and_other_settings_are_refused(tmp_path: Path) -> None:
    index = make_set(tmp_path, 5)
    folder, raw = Path(index.location), tmp_path / "raw"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    lines: list[str] = []
    again = MakeShardsConfig(
        "folder", str(raw), str(folder), classes="cityscapes", image_format=ImageFormat.PNG, samples_per_shard=4
    )
    make_shards(again, progress=lines.append)
    assert "is finished already with these settings: 5 samples are kept" in lines[0]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match=r"made with other settings: max_side \(was 0, is 16\); use another --output"):
        make(raw, output=str(folder), samples_per_shard=4, max_side=16)


def test_folders_of_others_are_not_touched(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 2)
    save(Path(f"{raw}-shards") / "holiday.png", random_pair(0)[0])
    with pytest.raises(ValueError, match=r"holds .* and was not made by this command; use another --output"):
        make(raw)
    with pytest.raises(ValueError, match=r"--input .*nowhere: there is no such folder"):
        make(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_side": -1}, "must be positive"),
        ({"height": 8}, "give --size as HEIGHTxWIDTH"),
        ({"max_side": 8, "height": 8, "width": 8}, "exclude each other"),
        ({"height": 9000, "width": 9000}, "--size 9000x9000 is too large: .* 67108864 in all with --image-format jpg"),
        ({"height": 70_000, "width": 10}, "--size 70000x10 is too large: an image may have 65500 pixels a side"),
        ({"max_side": 65_501}, "--max-side 65501 is too large: an image may have 65500 pixels a side"),
        ({"max_side": 16_384, "image_format": ImageFormat.WEBP}, "may have 16383 pixels a side .*format webp"),
        ({"quality": 0}, "--quality 0 must be between 1 and 100"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0 must be at least 1"),
        ({"bytes_per_shard": -1}, "--bytes-per-shard -1 must be positive"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MakeShardsConfig(**{"dataset": "folder", "input": "in", "output": "out"} | settings)


def test_settings_are_remembered(tmp_path: Path) -> None:
    index = make_set(tmp_path, 2)
    settings = json.loads((index.folder / "index.json").read_text())["settings"]
    assert (settings["image_format"], settings["quality"], settings["samples_per_shard"]) == ("png", 95, 4)
    assert settings["converter"]["ids"]["255"] == 255
