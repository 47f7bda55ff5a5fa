import io
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from iccld.data.images.decode import decode_image, decode_label
from iccld.data.shards.indexing import IndexResult, build_index
from iccld.data.storage.index import ShardIndex
from tests.data.factory import HEIGHT, WIDTH, members, opened, pair_members, png, random_pair, save, write_tar


def build(folder: Path, **settings: Any) -> IndexResult:
    return build_index(folder, progress=lambda line: None, **settings)


def assert_holds_pairs(index: ShardIndex, seeds: dict[str, int]) -> None:
    assert {index.key(i) for i in range(len(index))} == set(seeds)
    for i in range(len(index)):
        image, label = members(index, i)
        expected_image, train_ids = random_pair(seeds[index.key(i)])
        np.testing.assert_array_equal(decode_image(image), expected_image)
        np.testing.assert_array_equal(decode_label(label), train_ids)
        assert index.samples["class_pixels"][i].tolist() == [int((train_ids == c).sum()) for c in range(19)]
        assert (index.samples["height"][i], index.samples["width"][i]) == (HEIGHT, WIDTH)


def jpeg(array: np.ndarray, extension: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, extension)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=pax"], ["--format=ustar"], ["--sort=name"]])
def test_tars_of_plain_tar_are_indexed(tmp_path: Path, options: list[str]) -> None:
    long = "n" * 80 if "ustar" in options[0] else "n" * 180
    for i in range(3):
        image, train_ids = random_pair(i)
        save(tmp_path / "files" / "drive" / f"{long}{i}.png", image)
        save(tmp_path / "files" / "drive" / f"{long}{i}.label.png", train_ids)
    (tmp_path / "files" / "README").write_text("not a sample")
    shards = tmp_path / "shards"
    shards.mkdir()
    subprocess.run(["tar", "-C", tmp_path / "files", *options, "-cf", shards / "any.tar", "."], check=True)
    index = opened(build(shards, dataset="mine"))
    assert index.header.dataset == "mine" and index.header.has_labels
    assert_holds_pairs(index, {f"drive/{long}{i}": i for i in range(3)})


def test_members_of_a_sample_need_not_be_adjacent(tmp_path: Path) -> None:
    pairs = [pair_members(f"x{i}", i) for i in range(3)]
    images_first = {f"x{i}.png": pairs[i][f"x{i}.png"] for i in range(3)}
    write_tar(tmp_path / "a.tar", images_first | {f"x{i}.label.png": pairs[i][f"x{i}.label.png"] for i in (2, 0, 1)})
    assert_holds_pairs(opened(build(tmp_path)), {f"x{i}": i for i in range(3)})


def test_tars_of_webdatasets_writers_are_indexed(tmp_path: Path) -> None:
    with webdataset.ShardWriter(f"{tmp_path}/set-%03d.tar", maxcount=2, verbose=0) as writer:
        for i in range(5):
            image, train_ids = random_pair(i)
            writer.write({"__key__": f"drive/f{i}", "png": image, "seg.png": train_ids, "cls": i, "json": {"i": i}})
    index = opened(build(tmp_path, label_extension="seg.png"))
    assert index.header.num_shards == 3
    assert_holds_pairs(index, {f"drive/f{i}": i for i in range(5)})


def test_formats_may_be_mixed_and_labels_left_out(tmp_path: Path) -> None:
    image = random_pair(0)[0]
    data = {f"{e}.{e}": jpeg(image, "jpeg" if e in ("jpg", "jpeg") else e) for e in ("jpg", "jpeg", "png", "webp")}
    write_tar(tmp_path / "a.tar", data | {"png.label.png": b"never read"})
    index = opened(build(tmp_path, label_extension=""))
    assert [index.key(i) for i in range(4)] == ["jpg", "jpeg", "png", "webp"]
    assert not index.header.has_labels and not index.samples["class_pixels"].any()
    assert not index.samples["label_size"].any()


def test_the_image_may_be_named(tmp_path: Path) -> None:
    left, right = png(random_pair(0)[0]), png(random_pair(1)[0])
    write_tar(tmp_path / "a.tar", {"x.png": left, "x.Right.PNG": right})
    assert members(opened(build(tmp_path, image_extension="right.png")), 0)[0] == right


def test_one_and_three_workers_write_the_same(tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        for number in range(4):
            pairs = [pair_members(f"s{number}_{i}", 5 * number + i) for i in range(2)]
            write_tar(tmp_path / name / f"{number}.tar", pairs[0] | pairs[1] | {f"s{number}.png": b"broken"})
        result = build(tmp_path / name, num_workers=workers, accept_bad=True)
        assert [problem.key for problem in result.problems] == ["s0", "s1", "s2", "s3"]
    for file in (tmp_path / "one" / "index").iterdir():
        assert file.read_bytes() == (tmp_path / "three" / "index" / file.name).read_bytes()
    assert not (tmp_path / "one" / "indexing").exists()


CUT = png(random_pair(0)[0])[:300]
BROKEN = {
    "the label has 8x8 pixels, its image 24x32; pack it again, or leave out": {
        "x.png": png(random_pair(0)[0]),
        "x.label.png": png(np.zeros((8, 8), np.uint8)),
    },
    "the label holds 19, 33; labels must hold train ids, 0-18 or 255": {
        "x.png": png(random_pair(0)[0]),
        "x.label.png": png(np.array([[19, 33] * 16] * 24, np.uint8)),
    },
    "the label cannot be decoded (": {"x.png": png(random_pair(0)[0]), "x.label.png": b"no image"},
    "its label is empty": {"x.png": png(random_pair(0)[0]), "x.label.png": b""},
    "the image cannot be decoded (": {"x.png": CUT, "x.label.png": png(random_pair(0)[1])},
    "it has no image (jpg, jpeg, png, webp), only label.png; add one, or name it by --image-extension": {
        "x.label.png": png(random_pair(0)[1])
    },
    "it has no image (jpg, jpeg, png, webp), only json, txt": {"x.txt": b"hello", "x.json": b"{}"},
    "it has no label, but 2 of 3 samples have one; label all samples or none": {"x.png": png(random_pair(0)[0])},
    "its key is also in b.tar; label all samples or none, and give each a key of its own": {},
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_samples_are_named_and_left_out_if_accepted(tmp_path: Path, what: str) -> None:
    write_tar(tmp_path / "b.tar", pair_members("good1", 1) | (pair_members("x", 3) if not BROKEN[what] else {}))
    write_tar(tmp_path / "c.tar", (BROKEN[what] or pair_members("x", 4)) | pair_members("good2", 2))
    refused = build(tmp_path)
    assert refused.index is None and [(p.key, p.file) for p in refused.problems] == [("x", str(tmp_path / "c.tar"))]
    assert f"c.tar: sample 'x': {what}" in str(refused.problems[0]) and "--accept-bad" in str(refused.problems[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "c.tar"]
    accepted = build(tmp_path, accept_bad=True)
    assert accepted.problems == refused.problems
    assert_holds_pairs(opened(accepted), {"good1": 1, "good2": 2} | ({} if BROKEN[what] else {"x": 3}))


def test_all_that_is_broken_is_named_at_once(tmp_path: Path) -> None:
    for number, pairs in enumerate(BROKEN.values()):
        write_tar(tmp_path / f"{number}.tar", pair_members(f"good{number}", number) | pairs)
    assert len(build(tmp_path).problems) == sum(bool(pairs) for pairs in BROKEN.values())


def test_what_cannot_be_indexed_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder; give the folder of the tars"):
        build(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no .tar files to index"):
        build(tmp_path)
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(ValueError, match=r"its 1 tars hold no samples"):
        build(tmp_path)
    for data in (b"", b"\x1f\x8b compressed"):
        (tmp_path / "a.tar").write_bytes(data)
        result = build(tmp_path, accept_bad=True)
        assert result.index is None and "a.tar: it is no whole, uncompressed tar" in str(result.problems[0])
    write_tar(tmp_path / "a.tar", pair_members("x", 0))
    build(tmp_path)
    with pytest.raises(ValueError, match="index is there already; remove it"):
        build(tmp_path)
    (tmp_path / "b" / "making").mkdir(parents=True)
    write_tar(tmp_path / "b" / "a.tar", {})
    with pytest.raises(ValueError, match="b: `iccld shards make` has not finished here; give that command again"):
        build(tmp_path / "b")


def test_a_crashed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pair_members("x", 0))
    for name in ("indexing", "index.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.npy").write_bytes(b"half")
    opened(build(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "index"]


@pytest.mark.parametrize("name", ["index.tmp", "index.0123abcd.tmp"])
def test_a_folder_of_the_users_that_is_called_as_ours_is_left(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", pair_members("x", 0))
    (tmp_path / name / "mine").mkdir(parents=True)
    (tmp_path / name / "mine" / "thesis.txt").write_text("precious")
    opened(build(tmp_path))
    assert (tmp_path / name / "mine" / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.tar", "index", name])
