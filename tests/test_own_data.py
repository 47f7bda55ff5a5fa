"""docs/own-data.md, "Own data in one sitting": its commands and its file of classes, on tiny drawn data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iccld.config import load_config
from iccld.data.classes import read_classes
from iccld.programs.run.hand_off import origin_of
from tests.data.factory import save

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "own-data.md").read_text()
IDS = (0, 20, 10, 30, 41, 77)


def blocks(kind: str) -> list[str]:
    section = PAGE.split("## Own data in one sitting")[1].split("\n## ")[0]
    return re.findall(rf"^```{kind}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def draw(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(6):
        labels = np.repeat(np.repeat(generator.choice(IDS, (6, 8)), 16, 0), 16, 1).astype(np.uint8)
        image = np.stack([labels, 255 - labels, 2 * labels], -1) + generator.integers(0, 9, (96, 128, 3))
        save(folder / "renderings/images" / f"{number}.png", image.astype(np.uint8))
        save(folder / "renderings/labels" / f"{number}.png", labels)
        save(folder / "photographs/images" / f"photo_{number}.png", image[::-1].astype(np.uint8))


def test_nothing_of_another_data_set_is_in_a_run_on_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (yaml,), (commands,) = blocks("yaml"), blocks("sh")
    monkeypatch.chdir(tmp_path)
    Path("my_classes.yaml").write_text(yaml)
    words = commands.replace("\\\n", " ").split("iccld train ")[1].split("\n")[0].split()
    config = load_config(words)
    data = config.data
    assert (data.target_margin_top, data.target_margin_bottom) == (0.0, 0.0)
    assert [data.source.name, data.target.name, data.validation.name] == ["", "", ""]
    origin = origin_of(config, stage="stage1", weights="teacher", step=1)
    assert origin["data"] == {"source": ["renderings"], "target": ["photographs"]}


@pytest.mark.slow
def test_the_page_leads_from_two_folders_to_overlays(tmp_path: Path) -> None:
    (yaml,), (commands,) = blocks("yaml"), blocks("sh")
    assert len(yaml.splitlines()) <= 15
    draw(tmp_path)
    (tmp_path / "my_classes.yaml").write_text(yaml)
    script = f'set -e\niccld() {{ "{sys.executable}" -m iccld "$@"; }}\n{commands}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    names = list(read_classes(tmp_path / "my_classes.yaml").class_set.names)
    assert names == ["floor", "wall", "shelf", "lamp", "robot"]
    assert "robot" in done.stdout and "road" not in done.stdout
    card = json.loads((tmp_path / "runs/mine/stage2/final/teacher/config.json").read_text())
    assert card["class_names"] == names and card["palette"][4] == [220, 20, 60]
    results = json.loads((tmp_path / "runs/mine/report/results.json").read_text())
    assert results["stage1"]["names"] == names
    with Image.open(next((tmp_path / "overlays").rglob("photo_0_label.png"))) as picture:
        assert (picture.getpalette() or [])[:6] == [138, 109, 59, 200, 200, 200]
