"""Everything in an input is paired, named or counted, in folders and in zips."""

import os
import re
import shutil
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccld.cli import main
from iccld.data.shards.converters import open_converter
from iccld.data.shards.converters.converter import Survey
from iccld.data.shards.converters.pairing import Pair, pair_labels
from iccld.data.storage.index import ShardIndex
from tests.data.factory import png, random_pair
from tests.data.shards.test_data_sets import write_folder, write_zip

IMAGE, LABEL = (png(array) for array in random_pair(0))
NFC, NFD = (unicodedata.normalize(form, "M\u00fcnster") for form in ("NFC", "NFD"))


def survey(root: Path, *, with_labels: bool = True) -> Survey:
    return open_converter("folder", root).survey(with_labels=with_labels)


def pairs_of(root: Path) -> dict[str, str | None]:
    return {pair.image: pair.label for pair in survey(root).pairs}


@pytest.mark.parametrize("write", [write_folder, lambda root, files: write_zip(root / "a.zip", files)])
@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/IMG_1.JPG", "labels/IMG_1.PNG"),
        ("Images/a.jpg", "LABELS/A.png"),
        (f"images/{NFD}.jpg", f"labels/{NFC}.png"),
        (f"images/{NFC}/a.jpg", f"labels/{NFD}/a.png"),
        ("set/Images/a.jpg", "set/Labels/a.png"),
    ],
)
def test_labels_are_found_by_case_and_accents_written_otherwise(tmp_path: Path, write, image: str, label: str) -> None:
    root = write(tmp_path / "in", {image: b"", label: b""})
    found, prefix = pairs_of(root), "set/" if image.startswith("set/") else ""
    assert found == {image.removeprefix(prefix): label.removeprefix(prefix)}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_label_is_one_image_s_and_a_name_of_its_own_comes_first(data: st.DataObject) -> None:
    names = st.lists(st.sampled_from(["a", "A", "\u00fc", "u\u0308", "\u00dc", "b"]), unique=True, max_size=4)
    images, files = data.draw(names), data.draw(names)
    pairs = [Pair(name, f"i/{name}", f"l/{name}") for name in images]
    try:
        found = pair_labels(pairs, [f"l/{name}" for name in files])
    except ValueError as error:
        assert "rename them alike" in str(error)
        return
    labels = [pair.label for pair in found]
    assert len(set(labels)) == len(labels)
    for before, after in zip(pairs, found, strict=True):
        assert after == before or (before.label or "")[2:] not in files
        same = [unicodedata.normalize("NFC", (pair.label or "")).lower() for pair in (before, after)]
        assert same[0] == same[1]


def test_what_is_not_clear_is_asked(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "in", {"images/a.jpg": b"", "labels/A.png": b"", "labels/A.PNG": b""})
    with pytest.raises(ValueError, match=r"images/a.jpg, labels/A.PNG, labels/A.png: it is not clear which label"):
        survey(root)
    root = write_folder(tmp_path / "b", {"images/A.jpg": b"", "images/a.jpg": b"", "labels/A.png": b""})
    assert pairs_of(root) == {"images/A.jpg": "labels/A.png", "images/a.jpg": "labels/a.png"}, "which is missing"


def test_images_that_would_be_lost_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "in", {"images/a.png": IMAGE, "labels/a.png": LABEL, "images/b.TIF": b""})
    write_folder(root, {"images/c.jfif": b"", "images/d.gif": b""})
    (root / "images" / "e.png").symlink_to("gone")
    os.mkfifo(root / "images" / "f.png")
    paths = ["--input", str(root), "--output", str(tmp_path / "out")]
    command = ["shards", "make", "--dataset", "folder", "--classes", "cityscapes", *paths]
    assert main([*command, "--workers", "1"]) == 1
    bad = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bad: ")]
    assert [line.partition("/images/")[2].partition(";")[0] for line in bad] == [
        "e.png: it is a link to nothing",
        "f.png: it is a FIFO",
        "b.TIF: images of its format are not read",
        "c.jfif: images of its format are not read",
        "d.gif: images of its format are not read",
    ]
    assert main([*command, "--workers", "1", "--accept-bad"]) == 0
    assert "1 samples, 5 pairs left out" in capsys.readouterr().out
    assert len(ShardIndex.open(tmp_path / "out")) == 1


def test_what_is_no_image_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["images/Thumbs.db", "images/x.txt", "labels/a.txt", "labels/z.png", "labels/a.jpg", "images/.DS_Store"]
    root = write_folder(tmp_path / "in", {"images/a.png": IMAGE, "labels/a.png": LABEL} | dict.fromkeys(files, b""))
    (root / "images" / "loop").symlink_to("..")
    paths = ["--input", str(root), "--output", str(tmp_path / "out")]
    command = ["shards", "make", "--dataset", "folder", "--classes", "cityscapes", *paths]
    assert main([*command, "--workers", "1"]) == 0
    said = set(capsys.readouterr().out.splitlines())
    assert said >= {
        "1 files are not used: .db, such as images/Thumbs.db",
        "2 files are not used: .txt, such as images/x.txt",
        "1 files are not used: .jpg, such as labels/a.jpg",
        f"1 links to folders passed over: they lead back, such as {root}/images/loop",
        f"1 files or folders passed over: hidden names, or the system's own, such as {root}/images/.DS_Store",
        f"1 label files belong to no image, such as {root}/labels/z.png",
    }


def test_labels_are_no_matter_without_labels(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"images/a.png": b"", "labels/A.png": b"", "labels/z.png": b""})
    found = survey(root, with_labels=False)
    assert not found.spare_labels and not found.passed_over.kinds and len(found.pairs) == 1


@pytest.mark.parametrize("with_labels", [True, False])
def test_what_a_zip_adds_to_an_unpacked_folder_is_said(tmp_path: Path, with_labels: bool) -> None:
    files = {f"{kind}/{name}.png": b"" for kind in ("images", "labels") for name in "ab"}
    root = write_folder(tmp_path / "in", dict(list(files.items())[::2]))
    packed = write_zip(root / "old_export.zip", files)
    lines = survey(root, with_labels=with_labels).passed_over.lines()
    what, count = ("images and labels", 2) if with_labels else ("images", 1)
    assert [line for line in lines if "twice" not in line] == [
        f"{count} {what} come from old_export.zip beside the folder's own (move it away if it is no part of the set), "
        f"such as images/b.png"
    ]
    for kind in ("images", "labels"):
        shutil.rmtree(root / kind)
    assert len(survey(root).pairs) == 2 and not survey(root).passed_over.kinds, "nothing is to be said of zips alone"
    packed.rename(root / "all.zip")
    write_folder(root, {"readme.txt": b""})
    assert not survey(root).passed_over.kinds


@pytest.mark.parametrize("with_labels", [True, False])
def test_an_image_that_a_linked_folder_shows_again_is_one_sample(tmp_path: Path, with_labels: bool) -> None:
    root = write_folder(tmp_path / "in", {"images/new/a.png": b"", "labels/new/a.png": b"", "images/new/b.png": b""})
    for kind in ("images", "labels"):
        (root / kind / "latest").symlink_to("new")
    (root / "images" / "again").symlink_to("new")  # and no such folder of labels
    found = survey(root, with_labels=with_labels)
    assert [pair.image for pair in found.pairs] == ["images/new/a.png", "images/new/b.png"]
    again = f"4 images are not used again: linked folders show them twice, such as {root}/images/again/a.png"
    assert found.passed_over.lines() == [again] and not found.spare_labels and not found.problems


def test_images_that_share_linked_labels_and_images_of_two_labels_are_all_used(tmp_path: Path) -> None:
    files = ["images/clear/a.png", "images/fog/a.png", "labels/clear/a.png", "labels/fine/a.png", "pool/a.png"]
    root = write_folder(tmp_path / "in", dict.fromkeys(files, b""))
    links = {"labels/fog": "clear", "images/fine": "clear", "images/far": "../pool"}
    for link, target in links.items():
        (root / link).symlink_to(target)
    found = survey(root)
    assert {pair.image: pair.label for pair in found.pairs} == {
        f"images/{name}/a.png": f"labels/{name}/a.png" for name in ("clear", "far", "fine", "fog")
    }
    assert not found.passed_over.kinds


def test_an_input_of_other_formats_is_told_so(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"images/a.tif": b"", "images/b.tif": b""})
    with pytest.raises(
        ValueError, match=r"; 2 images are not read, such as images/a.tif \(images of its format .*\): convert"
    ):
        survey(root)


def test_images_of_another_ending_are_told_how_to_be_read(tmp_path: Path) -> None:
    image, label = "leftImg8bit/train/ulm/{}_leftImg8bit.{}", "gtFine/train/ulm/{}_gtFine_labelIds.png"
    files = {image.format("a", "jpg"): IMAGE, image.format("b", "JPEG"): IMAGE} | {label.format("a"): LABEL}
    root = write_folder(tmp_path / "in", files)
    rule = r"it ends in \.jpg, and the layout's images in \.png\): copy (.*), write \.{suffix} for \.png in `images:`"
    with pytest.raises(ValueError, match=rf"; 2 images are not read, such as .*a_leftImg8bit.jpg \({rule}") as said:
        open_converter("cityscapes", root, split="train").survey()
    found = re.search(rule, str(said.value))
    assert found
    (tmp_path / "copy.yaml").write_text(Path(found[1]).read_text().replace("_leftImg8bit.png", "_leftImg8bit.{suffix}"))
    copied = open_converter(str(tmp_path / "copy.yaml"), root, split="train").survey()
    assert len(copied.pairs) == 2 and not copied.problems
    write_folder(root, {image.format("c", "png"): IMAGE})
    bad = open_converter("cityscapes", root, split="train").survey().problems
    assert ["it ends in" in problem.what and "--accept-bad" in problem.remedy for problem in bad] == [True, True]


def test_images_and_labels_may_lie_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{images: 'd/{f}.jpg', labels: 'd/{f}_ids.png', labels_as: ids}")
    root = write_folder(tmp_path / "in", {"d/a.jpg": b"", "d/a_ids.png": b"", "d/b_ids.png": b"", "d/c.tif": b""})
    found = open_converter(str(tmp_path / "mine.yaml"), root).survey()
    assert [(pair.image, pair.label) for pair in found.pairs] == [("d/a.jpg", "d/a_ids.png")]
    assert found.spare_labels == ["d/b_ids.png"] and [problem.file[-7:] for problem in found.problems] == ["d/c.tif"]


@pytest.mark.parametrize(
    ("images", "labels", "files"),
    [
        ("d/{f}.png", "d/{f}_ids.png", ["a.png", "a_ids.png", "b.PNG", "B_ids.png"]),
        ("d/{f}.{suffix}", "d/{f}.png", ["a.jpg", "a.png", "b.webp", "b.png"]),
    ],
)
def test_a_label_whose_name_fits_images_too_is_no_image(
    tmp_path: Path, images: str, labels: str, files: list[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"{{images: '{images}', labels: '{labels}', labels_as: ids}}")
    root = write_folder(tmp_path / "in", {f"d/{name}": b"" for name in files})
    converter, expected = open_converter(str(tmp_path / "mine.yaml"), root), [f"d/{name}" for name in files]
    for with_labels in (True, False):
        found = converter.survey(with_labels=with_labels)
        assert [pair.image for pair in found.pairs] == expected[::2]
        assert not found.problems and not found.spare_labels
        said = "2 files are labels of other images by their names, such as "
        assert [line.partition("d/")[0] for line in found.passed_over.lines()] == [said] * (not with_labels)
    assert [pair.label for pair in converter.pairs()] == expected[1::2]


def test_a_label_without_its_image_is_no_image_with_itself_as_its_label(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{images: 'd/{f}.{suffix}', labels: 'd/{f}.png', labels_as: ids}")
    root = write_folder(tmp_path / "in", {f"d/{name}": b"" for name in ("a.jpg", "a.png", "c.png")})
    found = open_converter(str(tmp_path / "mine.yaml"), root).survey()
    assert [(pair.image, pair.label) for pair in found.pairs] == [("d/a.jpg", "d/a.png")]
    assert found.spare_labels == ["d/c.png"]


def test_other_splits_and_kinds_of_labels_are_no_lost_images(tmp_path: Path) -> None:
    files = [
        "rgb_anon/fog/{}/S/a_rgb_anon.png",
        "gt/fog/{}/S/a_gt_labelTrainIds.png",
        "gt/fog/{}/S/a_gt_labelColor.png",
    ]
    root = write_folder(
        tmp_path, {name.format(split): b"" for name in files for split in ("train", "val", "train_ref")}
    )
    found = open_converter("acdc", root, split="train").survey()
    assert len(found.pairs) == 1 and not found.problems and not found.spare_labels
    assert [count for count, _ in found.passed_over.kinds.values()] == [2 + 5]


def raw_zip(path: Path, files: dict[bytes, bytes]) -> Path:
    """A zip whose names are these bytes, without a word on their encoding."""
    plain = {f"{i:0{len(name)}d}": name for i, name in enumerate(files)}
    write_zip(path, {stand_in: files[name] for stand_in, name in plain.items()})
    data = path.read_bytes()
    for stand_in, name in plain.items():
        data = data.replace(stand_in.encode(), name)
    path.write_bytes(data)
    return path


def test_names_in_zips_are_read_as_they_were_meant(tmp_path: Path) -> None:
    other = {f"images/{NFC}0000.png": IMAGE, "labels/x": b""}
    assert pairs_of(write_zip(tmp_path / "0.zip", other)), "with the mark of UTF-8"
    image, label = (f"{folder}\\{NFC}_____0001.png" for folder in ("images", "labels"))
    found = pairs_of(raw_zip(tmp_path / "1.zip", {image.encode(): IMAGE, label.encode(): LABEL}))
    assert found == {image.replace("\\", "/"): label.replace("\\", "/")}
    dos = "images/M\u00fcnster__0001.png".encode("cp437")
    assert list(pairs_of(raw_zip(tmp_path / "2.zip", {dos: IMAGE}))) == ["images/M\u00fcnster__0001.png"]


def test_what_of_a_zip_is_not_seen_is_named_or_counted(tmp_path: Path) -> None:
    root = tmp_path / "in"
    packed = write_zip(
        root / "a.zip", {"images/a.png": IMAGE, "../images/b.png": b"", "images/.c.png": b"", "/d.txt": b""}
    )
    with zipfile.ZipFile(packed, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("images/a.png", IMAGE)
        link = zipfile.ZipInfo("images/l.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "a.png")
    write_folder(root, {"images/a.png": IMAGE})
    found = survey(root)
    assert [str(problem).replace(f"{packed}: ", "").partition(";")[0] for problem in found.problems] == [
        "../images/b.png: its name is absolute or leads out of the zip",
        "images/a.png: another file of the zip has its name",
        "images/l.png: it is a symbolic link in a zip",
    ]
    assert found.passed_over.lines() == [
        f"1 files passed over: hidden names, or the system's own, such as {packed}: images/.c.png",
        f"1 files passed over: its name is absolute or leads out of the zip, such as {packed}: /d.txt",
        f"1 files that are there twice; one is read, such as {packed}: images/a.png",
    ]
