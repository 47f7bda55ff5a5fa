"""Predicting many files: how far it is, and outputs that would surprise."""

from pathlib import Path

import pytest
from PIL import Image

from iccld.inference import progress
from tests.inference.test_files import predict_folder


def draw(folder: Path, count: int) -> Path:
    for number in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    return folder


def test_a_pipe_hears_every_while_how_many_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    predict_folder(draw(tmp_path, 3), tmp_path / "out")
    told = capsys.readouterr()
    assert [line for line in told.err.splitlines() if " of " in line] == [f"segmenting {i} of 3" for i in range(3)]
    assert not told.out


@pytest.mark.parametrize("name", ["out.jpg", "out.TIFF"])
def test_an_output_that_is_a_picture_of_another_kind_makes_no_folder(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=r"label pictures are PNGs: end it in \.png"):
        predict_folder(draw(tmp_path, 1) / "0.png", tmp_path / name)
    assert not (tmp_path / name).exists()
