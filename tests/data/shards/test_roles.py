import re
from pathlib import Path

import pytest

from tests.data.factory import pair_members, png, random_pair, write_tar
from tests.data.shards.test_indexing import assert_holds_pairs, build, opened

IMAGE, IDS = (png(array) for array in random_pair(0))


@pytest.mark.parametrize(
    ("extensions", "question"),
    [
        (
            ("jpg", "png"),
            "it has jpg, png, and no label.png; name its label, as in --label-extension png, or its image",
        ),
        (("png", "seg.png"), "it has png, seg.png, and no label.png; name its label, as in --label-extension seg.png"),
        (
            ("jpg", "png", "label.png"),
            "it has several images, jpg, png; say which is meant, as in --image-extension jpg",
        ),
        (
            ("0001.jpg", "0002.jpg"),
            "only 0001.jpg, 0002.jpg; add one, or name it by --image-extension (a key ends at the",
        ),
        (tuple(f"e{i}" for i in range(9)), "only e0, e1, e2, e3 and 5 more; add one"),
    ],
)
def test_which_is_the_label_is_asked(tmp_path: Path, extensions: tuple[str, ...], question: str) -> None:
    write_tar(tmp_path / "a.tar", dict.fromkeys((f"x.{extension}" for extension in extensions), IMAGE))
    result = build(tmp_path)
    assert result.index is None and len(result.problems) == 1
    assert question in str(result.problems[0])


def test_an_answer_is_taken(tmp_path: Path) -> None:
    for name, label in (("a", "png"), ("b", "seg.png"), ("c", "label.png")):
        write_tar(tmp_path / name / "a.tar", {"x.jpg": IMAGE, f"x.{label}": IDS, "x.json": b"{}"})
        result = build(tmp_path / name, label_extension=label)
        assert_holds_pairs(opened(result), {"x": 0})
        assert result.passed_over.lines() == ["1 members not used: .json, such as a.tar: x.json"]
    write_tar(tmp_path / "d" / "a.tar", pair_members("x", 0) | {"x.jpg": b"another"})
    assert_holds_pairs(opened(build(tmp_path / "d", image_extension="png")), {"x": 0})


def test_several_images_are_asked_about_without_labels_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": IMAGE, "x.png": IMAGE})
    (problem,) = build(tmp_path, label_extension="").problems
    assert re.search("several images, jpg, png; .*--image-extension jpg", str(problem))
