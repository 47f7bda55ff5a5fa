"""The end of launch/demo.sh: its table, its results and picture, and the page of its runs, looked at by a browser."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iccld.cli import main
from iccld.config import load_config
from iccld.labels import CITYSCAPES_19, CITYSCAPES_PALETTE
from launch import demo_report
from tests.browser import whole_page
from tests.demo.runs import commands, train_runs

KEYS = "items => items.map(i => [i.querySelector('.key').className, i.innerText])"
RUNS = ["source_only", "adapted", "twin"]


@pytest.fixture(scope="module")
def demo(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    train_runs(folder, scene_shards)
    return folder


@pytest.fixture(scope="module")
def page(demo: Path) -> Path:
    """The page that the script's own command writes."""
    (report,) = [command for command in commands(demo) if command[:2] == ["iccld", "report"]]
    assert [Path(word).name for word in report[2:5]] == RUNS
    assert main(report[1:]) == 0
    return Path(report[-1])


def test_the_table_has_each_run_and_the_twin(demo: Path, capsys: pytest.CaptureFixture[str]):
    demo_report.main(demo)
    results = json.loads((demo / "results.json").read_text())
    assert sorted(results) == ["source_only", "stage1", "stage2", "stage2_mean_latent", "twin"]
    assert list(results["stage2"]) == ["1", "4"] and list(results["twin"]) == ["1"]
    of_twin = json.loads((demo / "twin/report/results.json").read_text())
    assert results["twin"] == of_twin["stage2"] and results["stage1"] == of_twin["stage1"], "it takes over stage 1"
    table = capsys.readouterr().out
    columns = ["source only", "stage1", "stage2 x1", "stage2 x4", "mean latent", "twin x1"]
    assert all(column in table for column in columns) and all(name in table for name in CITYSCAPES_19.names)


def test_the_picture_has_a_column_each_prediction(demo: Path):
    demo_report.main(demo)
    with Image.open(demo / "comparison.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    columns, rows = 2 + len(["source only", "stage 1", "1 step", "4 steps"]), 5
    assert pixels.shape[1] > columns * 128 and pixels.shape[0] > rows * 64
    colours = {tuple(colour) for colour in pixels[:, -100:].reshape(-1, 3).tolist()}
    assert len(colours & set(CITYSCAPES_PALETTE)) >= 2


def test_the_twin_is_the_same_run_without_noise(demo: Path):
    adapted, twin = (
        [word for word in command if "run_dir" not in word]
        for command in commands(demo)
        if any(word.endswith(("/adapted", "/twin")) and word.startswith("run_dir=") for word in command)
    )
    config, other = load_config(adapted[4:]), load_config(twin[4:])
    assert other.stage2.objective.deterministic and not config.stage2.objective.deterministic
    other.stage2.objective.deterministic = False
    assert config.stage2 == other.stage2 and other.stages == ["stage2"]


def test_the_page_of_the_runs_shows_them_side_by_side(page: Path, browser: Any, tmp_path: Path):
    photograph = Path(os.environ.get("ICCLD_PHOTOGRAPHS", tmp_path)) / "report_of_the_demo.png"
    with whole_page(browser, page, photograph, width=1280) as shown:
        text = shown.inner_text("body")
        assert all(name in text for name in RUNS)
        for setting in ("stage2.objective.deterministic", "initial_model", "stage1_from"):
            assert setting in text, "in what they differ"
        assert shown.locator("img").count() == 4 and shown.locator("svg.chart").count() >= 16
        keys = shown.locator(".charts .legend li").evaluate_all(KEYS)
        assert {tuple(key) for key in keys} == {(f"key k{i}", name) for i, name in enumerate(RUNS)}, "one colour a run"
