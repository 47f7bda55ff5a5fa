"""`iccld evaluate MODEL --shards S`: scores of a model without its run, each set in a file of its own."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from iccld.cli import main
from iccld.data.storage.index import ShardIndex
from iccld.inference.model import ICCLD
from iccld.inference.scores import scores_of
from iccld.labels import CITYSCAPES_NAMES, CITYSCAPES_PALETTE
from iccld.models.model_card import ModelCard, ModelStage
from iccld.models.readme import describe
from tests.data.stream.test_bad_samples import spoil_the_image
from tests.distributed.launch import run_jobs
from tests.factory import scene_overrides
from tests.forked import Forked
from tests.models.factory import tiny_model
from tests.runtime.measure.test_memory import MIB, addresses_left


def test_a_model_is_scored_on_any_set_and_nothing_is_overwritten(
    scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, output = tmp_path / "street", tmp_path / "scores"
    tiny_model(num_classes=19).save_pretrained(folder, class_names=CITYSCAPES_NAMES, palette=CITYSCAPES_PALETTE)
    words = ["--output", str(output), "evaluation.diagnostic_images=0", "evaluation.max_images=2"]
    for name in ("validation", "target_labelled"):
        assert main(["evaluate", str(folder), "--shards", str(scene_shards / name), *words]) == 0
    found = {name: [*output.glob(f"report/results_street_{name}_*.json")] for name in ("validation", "target_labelled")}
    assert [len(paths) for paths in found.values()] == [1, 1]
    scores = json.loads(found["validation"][0].read_text())
    assert scores["stage1"]["num_images"] == 2 and scores["about"]["models"] == [str(folder)]
    assert main(["evaluate", str(folder), *words]) == 2
    assert "is a model without a run; name the set to score it on: --shards" in capsys.readouterr().err
    model = ICCLD.from_pretrained(folder)
    assert model.card is not None and "Not scored" in describe(model.card)
    model.card.origin["scores"] = scores_of(output, model.card)
    model.save_pretrained(tmp_path / "again")
    text = (tmp_path / "again/README.md").read_text()
    assert "Not scored" not in text and f" | {scores['stage1']['miou']:.2f} |" in text
    assert f"report/{found['validation'][0].name}" in text and "| target_labelled | validation |" in text


def test_a_broken_image_of_any_rank_is_what_the_user_must_mend(scene_shards: Path, tmp_path: Path):
    tiny_model(num_classes=19).save_pretrained(
        tmp_path / "street", class_names=CITYSCAPES_NAMES, palette=CITYSCAPES_PALETTE
    )
    shutil.copytree(scene_shards / "validation", tmp_path / "set")
    index = ShardIndex.open(tmp_path / "set")
    spoil_the_image(index, 1)  # of two ranks, the second scores it
    words = ["launch", "2", "evaluate", str(tmp_path / "street"), "--shards", str(tmp_path / "set"), "--output"]
    words += [str(tmp_path / "scores"), "evaluation.max_images=4", "evaluation.diagnostic_images=0"]
    log = tmp_path / "log"
    assert Forked("iccld", words, environment=dict(os.environ), log=log).wait(timeout=200) == 2, log.read_text()
    said = [line for line in log.read_text().splitlines() if index.key(1) in line]
    assert len(said) == 1 and "a fault of the program" not in log.read_text()


def test_what_rank_0_sees_decides_what_is_scored(scene_shards: Path, tmp_path: Path):
    """A rank whose node remembers an older folder would leave the others waiting."""
    settings = [*scene_overrides(scene_shards, tmp_path / "run"), "stages=[stage1]", "stage1.trainer.num_steps=1"]
    settings += ["evaluation.max_images=2"]
    job = {"checks": "tests.distributed.late_node_worker", "arguments": [str(tmp_path / "done"), *settings]}
    run_jobs([job], num_processes=2, timeout_s=120)
    assert json.loads((tmp_path / "run/report/results.json").read_text())["stage1"]["num_images"] == 2


def test_scoring_needs_no_compiler(scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "street"
    tiny_model(num_classes=19).save_pretrained(folder, class_names=CITYSCAPES_NAMES, palette=CITYSCAPES_PALETTE)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    words = [
        "--shards",
        str(scene_shards / "validation"),
        "--output",
        str(tmp_path / "scores"),
        "engine.compile=blocks",
    ]
    assert main(["evaluate", str(folder), *words, "evaluation.max_images=1", "evaluation.diagnostic_images=0"]) == 0


def test_scoring_that_lacks_memory_ends_in_one_line_with_what_to_set(
    scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "street"
    tiny_model(num_classes=19).save_pretrained(folder, class_names=CITYSCAPES_NAMES, palette=CITYSCAPES_PALETTE)
    words = ["--shards", str(scene_shards / "validation"), "--output", str(tmp_path / "scores")]
    words += ["evaluation.max_images=1", "evaluation.image_size=[16384,16384]"]
    with addresses_left(1000 * MIB):
        assert main(["evaluate", str(folder), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iccld evaluate: out of memory while scoring on cpu (") and "evaluation.batch_size=1" in line


def card_with(**origin: Any) -> ModelCard:
    return ModelCard(2, ModelStage.segmentation, ["road"], [[0, 0, 0]], {}, origin, weights_sha256="a" * 64)


@pytest.mark.parametrize("models", [[], ["model"], "model", None])
def test_a_file_of_scores_that_names_fewer_models_is_passed_over(tmp_path: Path, models: Any):
    (tmp_path / "report").mkdir()
    about = {"sha256": ["b" * 64, "a" * 64], "models": models}
    (tmp_path / "report/results.json").write_text(json.dumps({"about": about}))
    assert scores_of(tmp_path, card_with()) == []


def test_a_page_shows_the_scores_that_are_whole_and_no_others():
    whole = {"name": "val", "num_images": 2, "miou": None, "iou": {"road": 50.0, "sky": "a|b"}, "provenance": "seed 0"}
    broken = [whole | {key: [1]} for key in whole] + [{k: whole[k] for k in whole if k != key} for key in whole]
    text = describe(card_with(scores=[*broken, "scores", whole, None]))
    assert "|  | val |\n|---|---|\n| images | 2 |\n| mIoU | - |\n| road | 50.00 |\n| sky | a b |\n" in text
    assert "Not scored" in describe(card_with(scores=broken))
