"""Pictures in training: they are there, they change nothing, and they end nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from iccld.cli import main
from iccld.config import load_config
from iccld.labels import CITYSCAPES_PALETTE, IGNORE_INDEX
from iccld.programs.report.pictures import pictures_of
from iccld.programs.run.record import read_record
from iccld.programs.train import pictures
from iccld.uda.pseudo_labels import PseudoLabels, kept_labels
from tests.distributed.launch import run_jobs
from tests.factory import random_batch, scene_overrides
from tests.stages.test_adversarial import make_stage

SHORT = ["stage1.trainer.num_steps=4", "stage2.trainer.num_steps=2", "evaluation.diagnostic_images=0"]
SHORT += ["inference.num_steps=[1]", "evaluation.max_images=1", "stage1.trainer.checkpoint.save_every=2"]
DRAWN = ["stage1/step_00000002.png", "stage1/step_00000004.png", "stage2/step_00000002.png"]


def train(shards: Path, run_dir: Path, *more: str) -> None:
    assert main(["train", *scene_overrides(shards, run_dir), *SHORT, *more]) == 0


def losses(run_dir: Path) -> list[Mapping[str, float]]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name.startswith("loss")} for entry in entries]


@pytest.fixture(scope="module")
def with_pictures(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("drawn") / "run"
    loggers = "metrics.loggers=[jsonl,tensorboard]"
    train(scene_shards, run_dir, "metrics.pictures.every=2", "metrics.pictures.count=3", loggers)
    return run_dir


def test_a_picture_every_so_many_steps_is_in_the_folder_tensorboard_and_the_report(with_pictures: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = with_pictures / "pictures"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == DRAWN
    events = EventAccumulator(str(with_pictures / "tensorboard/stage1"))
    events.Reload()
    assert [event.step for event in events.Images("pictures")] == [2, 4]
    shown = [picture.name for picture in pictures_of(read_record(with_pictures))]
    assert shown == [f"pictures/{name}" for name in DRAWN]
    first, last = (np.asarray(Image.open(folder / name)) for name in DRAWN[:2])
    height, width = 48 * 3, 64 * 3
    crops = [np.s_[16 + i * (height + 4) : 16 + i * (height + 4) + height, 4 : 4 + width] for i in range(3)]
    assert all(np.array_equal(first[crop], last[crop]) for crop in crops), "the same crops"
    assert not np.array_equal(first[:, 8 + width : 12 + 3 * width], last[:, 8 + width : 12 + 3 * width])
    in_maps = {tuple(colour) for colour in first[16:, 8 + width : 8 + 2 * width].reshape(-1, 3).tolist()}
    assert in_maps <= {*CITYSCAPES_PALETTE, (0, 0, 0), (255, 255, 255)}, "the project's classes"


def test_training_is_the_same_without_pictures(with_pictures: Path, scene_shards: Path, tmp_path: Path):
    train(scene_shards, tmp_path / "run")
    assert not (tmp_path / "run/pictures").exists(), "by default there are few"
    assert losses(tmp_path / "run") == losses(with_pictures)
    for name in ("teacher", "student"):
        one, other = (
            load_file(run / f"stage2/final/{name}/model.safetensors") for run in (tmp_path / "run", with_pictures)
        )
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_what_fails_is_one_line_and_training_goes_on(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def fail(*_: object) -> None:
        raise RuntimeError("no room\non the device at https://user:hunter22@host/x")

    monkeypatch.setattr(pictures, "drawn", fail)
    train(scene_shards, tmp_path, "stages=[stage1]", "metrics.pictures.every=1")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pictures: ")]
    assert len(said) == 1 and said[0].startswith("pictures: rank 0: no room on the device at https://")
    assert said[0].endswith("; training goes on without them") and "hunter22" not in said[0]


def test_after_a_failure_on_any_rank_no_rank_gathers_the_weights_again(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    filled = list[object]()
    monkeypatch.setattr(pictures, "stage_for_whole_weights", lambda *of: of[0])
    monkeypatch.setattr(pictures, "gathered", lambda *of: filled.append(of) or of[0])
    said = [["", ""], ["", "no room"]]
    ranks = Mock(is_main=False, gather=Mock(side_effect=said))
    drawing = mocked_pictures(scene_shards, tmp_path, ranks)
    for step in range(1, 5):
        drawing.draw(step)
    assert len(filled) == 1 and ranks.gather.call_count == 2
    assert not capfd.readouterr().err, "the main rank says it"


def test_what_the_end_of_another_rank_causes_is_no_failure_of_a_picture(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pictures, "stage_for_whole_weights", lambda *_: Mock())
    drawing = mocked_pictures(scene_shards, tmp_path, Mock(is_main=True, gather=lambda value: [value]))
    monkeypatch.setattr(pictures, "gathered", Mock(side_effect=RuntimeError("Gloo: connection closed by peer")))
    with pytest.raises(RuntimeError, match="closed by peer"):
        drawing.draw(1)


def test_a_failure_names_its_rank(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(pictures, "stage_for_whole_weights", lambda *_: Mock())
    ranks = Mock(is_main=True, gather=lambda value: [value, "no room"])
    drawing = mocked_pictures(scene_shards, tmp_path, ranks)
    drawing.draw(1)
    assert capfd.readouterr().err == "pictures: rank 1: no room; training goes on without them\n"


def mocked_pictures(shards: Path, folder: Path, ranks: Mock) -> pictures.TrainingPictures:
    stage = Mock()
    stage.name = "stage1"
    config, engine = load_config(scene_overrides(shards, folder)), Mock(ranks=ranks)
    return pictures.TrainingPictures(stage, config, engine, metrics=Mock(), watchdog=Mock())


@pytest.mark.distributed
def test_a_rank_without_room_for_whole_weights_ends_no_training(scene_shards: Path, tmp_path: Path):
    settings = [*scene_overrides(scene_shards, tmp_path), *SHORT, "stages=[stage1]", "stage1.trainer.num_steps=2"]
    settings += ["data.validation.shards="]
    settings += ["metrics.pictures.every=1", "metrics.pictures.count=1"]
    job = {"checks": "tests.distributed.pictures_worker", "arguments": [str(tmp_path), *settings]}
    run_jobs([job], num_processes=2, engine="fsdp2", timeout_s=120)
    assert (tmp_path / "done").is_file()
    assert [path.name for path in sorted((tmp_path / "drawn/pictures/stage1").iterdir())] == [
        "step_00000001.png", "step_00000002.png"
    ]  # fmt: skip
    assert not (tmp_path / "one/pictures").exists()
    assert losses(tmp_path / "one") == losses(tmp_path / "drawn")


def test_one_that_a_kill_prevented_is_drawn_when_the_run_goes_on(scene_shards: Path, tmp_path: Path):
    """A kill between the save of step 2 and its picture."""
    train(scene_shards, tmp_path, "stages=[stage1]", "metrics.pictures.every=2")
    path = tmp_path / "pictures" / DRAWN[0]
    before = path.read_bytes()
    path.unlink()
    for name in ("step_00000004",):
        for file in sorted((tmp_path / "stage1/checkpoints" / name).iterdir()):
            file.unlink()
        (tmp_path / "stage1/checkpoints" / name).rmdir()
    (tmp_path / "stage1/checkpoints/latest").write_text("step_00000002")
    (tmp_path / "stage1/final").rename(tmp_path / "stage1/away")
    train(scene_shards, tmp_path, "stages=[stage1]", "metrics.pictures.every=2")
    assert path.read_bytes() == before


def test_pixels_that_are_left_out_are_black_unless_the_whole_image_weighs_nothing():
    labels = torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
    valid = torch.tensor([True, False]).view(1, 2, 1)
    pseudo = PseudoLabels(labels, torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), torch.zeros(1))
    of_image = kept_labels(pseudo, valid, class_thresholds=0.0)
    by_class = kept_labels(pseudo, valid, class_thresholds=0.9)
    assert of_image.tolist() == [[[0, 1], [IGNORE_INDEX, IGNORE_INDEX]]]
    assert by_class.tolist() == [[[IGNORE_INDEX, 1], [IGNORE_INDEX, IGNORE_INDEX]]]


def test_the_second_stage_shows_the_labels_that_it_trains_on():
    stage = make_stage(task_weight=1.0)
    batch = random_batch(num_classes=19, numbers=[0, 1])
    with torch.no_grad():
        shown, tensors = stage.pseudo_labels_of(batch), stage.prepare(batch, 0).tensors
    assert shown is not None
    mixed, pasted = tensors["mixed_labels"], tensors["mixed_labels"] == batch["source"]["labels"]
    assert torch.equal(mixed[~pasted], shown[~pasted].to(mixed.dtype))
