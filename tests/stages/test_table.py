"""The table of stages: each line has its section, its place and its models."""

import pytest

from iccld.config import Config, load_config
from iccld.models.model_card import ModelStage
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
