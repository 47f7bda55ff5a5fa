"""The page in a real browser: it fetches nothing, complains of nothing, and fits windows wide or narrow, light or dark.

`ICCLD_PHOTOGRAPHS=FOLDER` keeps the photographs.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iccld.cli import main
from tests.browser import whole_page
from tests.programs.recorded_runs import make_run

SIZES = "elements => elements.map(e => { const box = e.getBoundingClientRect(); return [box.width, box.height]; })"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    runs = [str(make_run(folder / "first")), str(make_run(folder / "second", gain=1.5, seed=1))]
    runs.append(str(make_run(folder / "third", done=120, seed=2)))
    found = {"one": folder / "one.html", "several": folder / "several.html"}
    assert main(["report", runs[0], "--output", str(found["one"])]) == 0
    assert main(["report", *runs, "--output", str(found["several"])]) == 0
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("name", ["one", "several"])
def test_the_page_is_whole_quiet_and_alone(
    browser: Any, pages: dict[str, Path], tmp_path: Path, name: str, width: int, scheme: str
):
    photograph = Path(os.environ.get("ICCLD_PHOTOGRAPHS", tmp_path)) / f"report_{name}_{width}_{scheme}.png"
    with whole_page(browser, pages[name], photograph, width=width, scheme=scheme) as page:
        for kind, count in (("svg.chart", 8), ("img", 3), ("polyline", 8), (".parts span", 5), (".swatch", 4)):
            sizes = page.locator(kind).evaluate_all(SIZES)
            assert len(sizes) >= count and all(w > 0 or h > 0 for w, h in sizes), kind
            assert kind in ("polyline", ".parts span") or all(w > 8 and h > 8 for w, h in sizes), kind
        assert page.locator("text").evaluate_all(
            "texts => texts.every(t => { const b = t.getBBox(), v = t.ownerSVGElement.viewBox.baseVal;"
            " return b.x >= 0 && b.y >= 0 && b.x + b.width <= v.width && b.y + b.height <= v.height; })"
        ), "no tick is cut off"
    brightness = float(np.asarray(Image.open(photograph).convert("L")).mean())
    assert brightness > 200 if scheme == "light" else brightness < 70
