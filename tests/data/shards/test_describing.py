from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.cli import main
from iccld.data.shards.describing import class_shares, draw_chart, facts
from iccld.data.storage.index import ShardIndex, sample_dtype, shard_dtype, write_index
from iccld.labels import CITYSCAPES_PALETTE
from tests.data.factory import make_set, random_pair


def test_shares_are_those_of_the_labels(tmp_path: Path) -> None:
    index = make_set(tmp_path, 6)
    labels = np.stack([random_pair(i)[1] for i in range(6)])
    for train_id, (_, pixels, count, samples) in enumerate(class_shares(index.header)):
        shown = labels == train_id
        assert pixels == pytest.approx(shown.sum() / (labels != 255).sum())
        assert (count, samples) == (shown.any((1, 2)).sum(), pytest.approx(shown.any((1, 2)).mean()))


def written(folder: Path, sides: list[tuple[int, int]], pixels: list[int]) -> ShardIndex:
    """An index of samples of these sizes, each of which shows the same classes."""
    samples = np.zeros(len(sides), sample_dtype(2))
    samples["height"], samples["width"] = np.array(sides).T
    samples["image_size"], samples["label_size"] = 3 << 20, 1 << 20
    samples["class_pixels"][:, : len(pixels)] = pixels
    (folder / "index").mkdir(parents=True)
    shards = np.array([(b"a.tar", 9 << 30), (b"b.tar", 1 << 30)], shard_dtype(5))
    write_index(folder / "index", dataset="mine", shards=shards, samples=samples)
    return ShardIndex.open(folder)


def test_facts(tmp_path: Path) -> None:
    said = dict(facts(written(tmp_path, [(10, 40), (20, 30)], [7])))
    assert said["data set"] == "mine" and said["samples"] == "2, all with labels"
    assert said["shards"] == "2, 10.0 GiB" and said["images and labels"] == "8.0 MiB, 4.0 MiB a sample"
    assert said["height x width"] == "from 10x30 to 20x40"
    assert dict(facts(written(tmp_path / "b", [(10, 40)], [])))["height x width"] == "10x40"


def test_the_table_and_the_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = make_set(tmp_path, 6)
    assert main(["shards", "info", index.location, "--chart", str(tmp_path / "classes.png")]) == 0
    printed = capsys.readouterr().out
    assert "6, all with labels" in printed and "24x32" in printed
    rows = [line.split("│") for line in printed.splitlines() if line.count("│") == 6]
    assert len(rows) == 19 and rows[6][2].strip() == "traffic light"
    shares = [float(row[3]) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    with Image.open(tmp_path / "classes.png") as chart:
        assert chart.format == "PNG" and min(chart.size) > 800
        colours = {colour for _, colour in chart.convert("RGB").getcolors(1 << 24) or []}
    for colour, share in zip(CITYSCAPES_PALETTE, shares, strict=True):
        assert not share or colour in colours, "bars of the classes that are there, in their colours"


@pytest.mark.parametrize("pixels", [[5], [0], [10**6, 1], [1] * 19])
def test_any_shares_can_be_drawn(tmp_path: Path, pixels: list[int]) -> None:
    draw_chart(written(tmp_path, [(10, 40)], pixels), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_sets_without_labels_have_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = make_set(tmp_path, 3, labels=False)
    assert main(["shards", "info", index.location]) == 0
    printed = capsys.readouterr().out
    assert "3, none with labels" in printed and "traffic light" not in printed
    assert main(["shards", "info", index.location, "--chart", str(tmp_path / "x.png")]) == 2
    captured = capsys.readouterr()
    assert "has no labels, so there are no classes to draw; leave it out" in captured.err and not captured.out


def test_a_chart_that_cannot_be_written_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, path = make_set(tmp_path, 3), tmp_path / "nowhere" / "x.png"
    assert main(["shards", "info", index.location, "--chart", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(
        f"--chart {path} cannot be written (No such file or directory); give a file in a folder that is there.\n"
    )
    assert captured.err.count("\n") == 1 and not captured.out


def test_keys_are_printed_one_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = make_set(tmp_path, 5)
    assert main(["shards", "info", index.location, "--keys"]) == 0
    assert capsys.readouterr().out.splitlines() == [index.key(i) for i in range(5)]
