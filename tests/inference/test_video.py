"""Videos: as many frames as there were, each overlaid; and what is no video."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.cli import main
from iccld.extras import remedy
from iccld.inference.prediction import segment
from iccld.inference.video import is_video, predict_video
from iccld.labels import CITYSCAPES_19
from tests.inference.test_files import dominant_channel

av = pytest.importorskip("av")
SEGMENT = partial(segment, predictors=[dominant_channel], names=CITYSCAPES_19.names, colours=CITYSCAPES_19.palette)


def write_video(path: Path, *, count: int = 5, height: int = 48, width: int = 64) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(count):
            frame = np.zeros((height, width, 3), np.uint8)
            frame[..., number % 3] = 200
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode(None))
    return path


def test_each_frame_is_overlaid_at_the_same_rate(tmp_path: Path):
    source = write_video(tmp_path / "drive.mp4")
    assert is_video(source)
    assert predict_video(source, tmp_path / "out", SEGMENT) == tmp_path / "out/drive_overlay.mp4"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["drive_overlay.mp4", "legend.png"]
    with av.open(str(tmp_path / "out/drive_overlay.mp4")) as written:
        assert written.streams.video[0].average_rate == 10
        frames = [frame.to_ndarray(format="rgb24") for frame in written.decode(video=0)]
    assert len(frames) == 5
    for number, frame in enumerate(frames):
        colour = np.zeros(3)
        colour[number % 3] = 200
        expected = (colour + CITYSCAPES_19.palette[number % 3]) / 2
        assert np.abs(frame.mean((0, 1)) - expected).max() < 12, "but for what the encoder loses"


def test_an_output_that_is_a_file_and_what_is_refused(tmp_path: Path):
    source = write_video(tmp_path / "drive.mp4", count=2)
    assert predict_video(source, tmp_path / "out.mp4", SEGMENT).is_file()
    with pytest.raises(ValueError, match="is the input and would be overwritten"):
        predict_video(source, source, SEGMENT)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken.mp4: it cannot be read as a video"):
        predict_video(tmp_path / "broken.mp4", tmp_path / "new.mp4", SEGMENT)
    assert not (tmp_path / "new.mp4").exists()


LISTS = {
    "ffconcat": "ffconcat version 1.0\nfile other.mp4\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("content", [*LISTS.values(), "no video"], ids=[*LISTS, "no video"])
@pytest.mark.parametrize("name", ["list.mp4", "concat:other.mp4"])
def test_no_other_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "other.mp4")
    Path(name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: it cannot be read as a video|has no picture|no frame"):
        predict_video(Path(name), tmp_path / "out", SEGMENT)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
def test_a_name_like_an_address_is_a_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / f"drive.{ending}", count=3).rename(f"http:{ending}.{ending}")
    assert predict_video(Path(f"http:{ending}.{ending}"), tmp_path / "out", SEGMENT).is_file()


def test_without_its_extra_the_message_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        predict_video(tmp_path / "a.mp4", tmp_path / "out", SEGMENT)
    assert remedy(missing.value) == "needs av; pip install 'iccld[video]'"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.mp4").write_bytes(b"")
    assert main(["predict", "m", str(tmp_path / "a.png"), str(tmp_path / "b.mp4"), str(tmp_path / "out")]) == 2
    assert "is a video, which is predicted alone" in capsys.readouterr().err
