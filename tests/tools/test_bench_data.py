"""The benchmark runs as a script, on drawn and on given images, and says what cannot be compared."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.factory import random_pair, save

ROOT = Path(__file__).parents[2]
TINY = ["--crop", "32", "--batch-size", "2", "--rounds", "2", "--seconds", "0.1", "--epoch", "40"]


def bench(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "benchmarks" / "bench_data.py"), *TINY, *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_all_loaders_are_compared(tmp_path: Path) -> None:
    done = bench(tmp_path, "--samples", "4", "--size", "48x64", "--json", "figures.json", "--png", "chart.png")
    assert not done.returncode, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name in ("ours_over_folder", "ours_over_webdataset", "resume_over_webdataset"):
        assert figures[name] > 0
    rates = figures["samples_per_s"]
    assert {"ours", "webdataset", "webdataset, simplejpeg", "folder of PNGs"} <= set(rates)
    assert all(len(own) == 2 and min(own) > 0 for own in rates.values())
    if "streaming" in rates:
        assert figures["ours_over_streaming"] > 0
    else:
        assert figures["ours_over_streaming"] is None and "cannot be imported here" in " ".join(done.stdout.split())
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"
    assert "First batch after resuming at sample 20" in done.stdout


def test_images_may_be_given(tmp_path: Path) -> None:
    for i in range(3):
        image, labels = random_pair(i, height=40, width=48)
        save(tmp_path / "frames" / f"{i}.jpg", image)
        save(tmp_path / "ids" / f"{i}.png", labels)
    save(tmp_path / "frames" / "without_label.jpg", image)
    done = bench(tmp_path, "--images", "frames", "--labels", "ids", "--json", "figures.json")
    assert not done.returncode, done.stderr
    assert json.loads((tmp_path / "figures.json").read_text())["ours_over_folder"] > 0
    assert (tmp_path / "bench_data.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "frames"], "--images and --labels belong together"),
        (["--images", "frames", "--labels", "frames"], "have no stem in common"),
        (["--samples", "2", "--size", "48x64", "--crop", "56"], "data.crop_size=[56, 56] is larger than"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    tmp_path: Path, refusal: Callable[..., str], arguments: list[str], message: str
) -> None:
    (tmp_path / "frames").mkdir()
    said = refusal("benchmarks/bench_data.py", *TINY, *arguments)
    assert said.startswith("bench_data: ") and message in said and "\n" not in said
