"""The table of stages: each line has its section, its place and its models."""

from pathlib import Path

import pytest

from iccld.config import Config, load_config, read_config
from iccld.models.model_card import ModelStage
from iccld.programs.evaluate.evaluate import saved_settings
from iccld.stages.settings import InferenceConfig
from iccld.stages.table import STAGES, stage_of
from tests.models.factory import tiny_model, trained_model


def test_every_stage_has_a_section_and_starts_from_one_before_it():
    assert all(hasattr(Config(), name) and kind.name == name for name, kind in STAGES.items())
    names = list(STAGES)
    assert all(not kind.previous or kind.previous in names[:i] for i, kind in enumerate(STAGES.values()))
    assert {kind.saved_as for kind in STAGES.values()} == {*ModelStage}, "stage_of finds one for every model"


def test_a_model_without_an_origin_is_of_the_first_stage_that_saves_such_models():
    assert stage_of(tiny_model()).name == "stage1" and stage_of(trained_model()).name == "stage2"


@pytest.mark.parametrize("stages", ["[]", "[stage2,stage1]", "[stage1,stage1]", "[stage3]"])
def test_stages_are_trained_in_the_order_of_the_table(stages: str):
    with pytest.raises(ValueError, match=r"stages=\[.*\] must be some of \[stage1, stage2\], in this order"):
        load_config([f"stages={stages}"])


def test_a_score_of_stage_2_is_never_that_of_the_decoder_alone(tmp_path: Path):
    """0 steps may stand beside others; saved settings that hold nothing else are read, and not scored by."""
    inference = InferenceConfig(num_steps=[0, 4, 1])
    assert STAGES["stage2"].main_score(inference) == "stage2 x4" and STAGES["stage2"].shown_steps(inference) == 4
    assert STAGES["stage1"].main_score(inference) == "stage1" and STAGES["stage1"].shown_steps(inference) == 0
    (tmp_path / "config.yaml").write_text("inference: {num_steps: [0]}")
    assert read_config(tmp_path / "config.yaml").inference.num_steps == [0]
    with pytest.raises(ValueError, match=r"inference\.num_steps=\[0\] would score stage 2 by the decoder alone"):
        saved_settings(tmp_path, [])
    assert saved_settings(tmp_path, ["inference.num_steps=[1,0]"]).inference.num_steps == [1, 0]
    assert saved_settings(tmp_path, ["stages=[stage1]"]).inference.num_steps == [0], "stage 1 denoises in no case"
    assert load_config(["stage=source_only", "inference.num_steps=[0]"]).stages == ["stage1"]
