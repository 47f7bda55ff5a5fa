"""The cost of the inter-coder connection: the law is found again in exact points, and a small run fills every cell."""

import json
import sys
from pathlib import Path

import bench_overhead
import pytest
from hypothesis import given
from hypothesis import strategies as st
from overhead_law import MODES, QUANTITIES, fit

TERMS = st.floats(-100, 100)


@given(a=TERMS, b=TERMS, c=TERMS)
def test_a_law_is_found_again(a: float, b: float, c: float):
    points = [{"megapixels": m, "classes": k} for m in (0.1, 0.2, 0.4) for k in (13, 19, 100)]
    law = fit(points, [a + b * point["megapixels"] + c * point["classes"] for point in points])
    assert [law[term]["value"] for term in "abc"] == pytest.approx([a, b, c], abs=1e-6)


def test_what_was_not_varied_has_no_term():
    points = [{"megapixels": m, "classes": 19} for m in (0.1, 0.2, 0.4)]
    law = fit(points, [point["megapixels"] for point in points])
    assert law.keys() == {"a", "b", "r2"} and law["r2"] == pytest.approx(1)


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--sizes", "32", "64", "--classes", "5", "--rounds", "1"]
    words += ["--json", str(tmp_path / "o.json"), "--png", str(tmp_path / "o.png")]
    monkeypatch.setattr(sys, "argv", ["bench_overhead", *words])
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    bench_overhead.main()
    figures = json.loads((tmp_path / "o.json").read_text())
    assert len(figures["points"]) == 4 and (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    for mode in MODES:
        for name in QUANTITIES:
            assert figures["laws"][mode][name]["overhead"]["b"]["value"] is not None
    for point in figures["points"]:
        assert point["overhead"]["flops"] > 0, "the connection's products are counted"
        assert point["overhead"]["flops"] == point["with"]["flops"] - point["without"]["flops"]
    flops = [figures["laws"][mode]["flops"]["overhead"] for mode in MODES]
    assert all(law["r2"] == pytest.approx(1) for law in flops), "FLOPs grow with the pixels, exactly"
