"""docs/inference.md runs: its Python as one program, and the commands of its page on pictures and videos."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.cli import main
from tests.inference.test_model import save
from tests.inference.test_video import write_video
from tests.models.factory import trained_model

PAGE = (Path(__file__).parent.parent / "docs/inference.md").read_text()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, an image, frames and a video of the names that the page uses."""
    save(trained_model(), tmp_path / "models/street")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    (tmp_path / "frames").mkdir()
    for name in ("street.jpg", "frames/a.png", "frames/b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    write_video(tmp_path / "drive.mp4", count=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_page_runs(desk: Path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    exec("".join(blocks), {})
    assert {"overlay.png", "labels.png", "probabilities.npz"} <= {path.name for path in desk.iterdir()}
    assert (desk / "models/copy/README.md").is_file()


def test_the_three_lines_of_a_segformer_run_too(desk: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=3
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained("segformer")
    transformers.SegformerImageProcessor().save_pretrained("segformer")
    (block,) = re.findall(r"```text\n(processor.*?)```", PAGE, re.DOTALL)
    assert len(block.splitlines()) == 3
    names = {name: getattr(transformers, name) for name in re.findall(r"\b(?:Auto|Segformer)\w+", block)}
    given = {**names, "Image": Image, "NAME": "segformer"}
    exec(block, given)
    assert tuple(given["labels"].shape) == (48, 80)


def test_the_commands_of_the_page_write_what_it_says(desk: Path):
    commands = [line for line in PAGE.splitlines() if line.startswith("iccld predict ")]
    assert len(commands) == 4
    for line in commands:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    labels, overlays = ["a_label.png", "b_label.png"], ["a_overlay.png", "b_overlay.png"]
    assert sorted(path.name for path in (desk / "out").iterdir()) == sorted([*labels, *overlays, "legend.png"])
    assert (desk / "out2/b_probabilities.npz").is_file()
    assert (desk / "labels2.png").is_file() and (desk / "drive_overlay.mp4").is_file()
