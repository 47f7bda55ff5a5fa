"""`stage1_from`: a run takes the finished stage 1 of another one as files of its own, or says why not."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from iccld.config import Config, config_from
from iccld.durable import file_checksum
from iccld.models.model_card import ModelCard, ModelStage
from iccld.models.readme import describe
from iccld.programs.run.hand_off import await_final, final_folder, handed_over, origin_of, take_first_stage


def finished_run(run_dir: Path) -> Path:
    """The folder that a finished stage 1 leaves; its weights are not read here."""
    final = final_folder(run_dir, "stage1")
    for weights in ("teacher", "student"):
        (final / weights).mkdir(parents=True)
        (final / weights / "model.safetensors").write_bytes(weights.encode() * 1000)
        (final / weights / "config.json").write_text("{}")
    names = list(Config().data.class_set.build().names)
    statistics = {f"{of}_{what}": [0.0, 1.0] for of in ("latent", "condition") for what in ("mean", "std")}
    checksum = file_checksum(final / "teacher/model.safetensors")
    facts = {"weights": "teacher", "step": 4, "class_names": names, "model_sha256": checksum, **statistics}
    (final / "hand_off.json").write_text(json.dumps(facts))
    return final


def config_of(folder: Path) -> Config:
    words = ["stages=[stage2]", f"run_dir={folder}/new", f"stage1_from={folder}/old"]
    return config_from({}, where="test", overrides=words)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_copy_is_whole_and_stays_when_the_other_run_is_removed(tmp_path: Path):
    final, config = finished_run(tmp_path / "old"), config_of(tmp_path)
    before = files(final)
    take_first_stage(config, is_main=True)
    shutil.rmtree(tmp_path / "old")
    copy = final_folder(tmp_path / "new", "stage1")
    assert files(copy) == before
    assert handed_over("stage1", config)[0] == copy / "teacher"
    assert [path.name for path in copy.parent.iterdir()] == ["final"]
    take_first_stage(config, is_main=True)  # it has one: the other run is not asked for


def test_one_rank_copies_and_nothing_is_copied_unasked(tmp_path: Path):
    finished_run(tmp_path / "old")
    take_first_stage(config_of(tmp_path), is_main=False)
    take_first_stage(config_from({}, where="test", overrides=[f"run_dir={tmp_path}/new"]), is_main=True)
    assert not (tmp_path / "new").exists()


def test_what_a_killed_copy_has_left_is_replaced(tmp_path: Path):
    final, config = finished_run(tmp_path / "old"), config_of(tmp_path)
    torn = tmp_path / "new/stage1/final.tmp/teacher"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    take_first_stage(config, is_main=True)
    assert files(final_folder(tmp_path / "new", "stage1")) == files(final)
    assert not torn.exists()


def _without(final: Path) -> None:
    shutil.rmtree(final)


def _changed(final: Path) -> None:
    (final / "teacher/model.safetensors").write_bytes(b"other")


def _linked(final: Path) -> None:
    weights = final / "student/model.safetensors"
    weights.rename(final.parent / "elsewhere")
    weights.symlink_to(final.parent / "elsewhere")


def _led_elsewhere(final: Path) -> None:
    facts = json.loads((final / "hand_off.json").read_text()) | {"weights": "../../secret"}
    (final / "hand_off.json").write_text(json.dumps(facts))


def _with_more(final: Path) -> None:
    (final / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without, "holds no finished stage 1"),
        (_changed, "checksum differs"),
        (_linked, "is a link"),
        (_led_elsewhere, "cannot be read"),
        (_with_more, "holds no finished stage 1"),
    ],
)
def test_what_stage_1_did_not_leave_is_refused(tmp_path: Path, spoil, words: str):
    spoil(finished_run(tmp_path / "old"))
    with pytest.raises(ValueError, match=words):
        take_first_stage(config_of(tmp_path), is_main=True)
    assert not final_folder(tmp_path / "new", "stage1").exists()


def test_a_run_that_trains_stage_1_takes_none():
    with pytest.raises(ValueError, match=r"stage1_from=x takes stage 1 from another run.*use stages=\[stage2\]"):
        config_from({}, where="test", overrides=["stage1_from=x"])


def test_a_card_lists_the_ids_that_count_as_a_class():
    words = ["data.class_set.names=[way,sky]", "data.class_set.of_train_id={0: 0, 1: 0, 10: 1}"]
    merged = config_from({}, where="test", overrides=words)
    origin = origin_of(merged, stage="stage1", weights="teacher", step=4)
    assert origin["label_ids"] == {"way": {"0": "road", "1": "sidewalk"}, "sky": {"10": "sky"}}
    facts = {"class_names": ["way", "sky"], "palette": [[1, 2, 3], [4, 5, 6]], "model": {}, "origin": origin}
    card = ModelCard(format_version=1, stage=ModelStage.segmentation, **facts)
    assert "| 0 | way | #010203 | 0 road, 1 sidewalk |" in describe(card)
    assert "| 1 | sky | #040506 |\n" in describe(replace(card, origin={"label_ids": "a stranger's"}))


def test_a_rank_waits_until_its_node_sees_what_rank_0_left(tmp_path: Path):
    folder = final_folder(tmp_path, "stage1")
    folder.parent.mkdir()
    threading.Timer(0.3, folder.mkdir).start()
    await_final(tmp_path, "stage1", limit_s=60)
    assert folder.is_dir()
    await_final(tmp_path, "stage1", limit_s=60)
    folder.rmdir()
    await_final(tmp_path, "stage1", limit_s=0.1)  # who needs the folder names it
