"""The baseline's recipe is laid over the other experiments, and changes in them what it says and nothing else."""

import re
from pathlib import Path

import pytest
import torch

from iccld import config as config_module
from iccld.config import differences, load_config
from iccld.programs.run.building import fresh_stage
from tests.factory import random_batch

BASES = sorted(
    path.stem
    for path in (Path(config_module.__file__).parent / "configs" / "experiment").glob("*.yaml")
    if path.stem != "daformer_recipe"
)
CHANGES = re.compile(r"model\.(latent(_channels)?|decoder\.inter_coder)|stage1\.objective\.\w+(\.\w+)?")


@pytest.mark.parametrize("base", BASES)
def test_daformers_recipe_changes_the_objective_and_the_decoder_alone(base: str) -> None:
    own, laid_over = load_config([f"experiment={base}"]), load_config([f"experiment=[{base},daformer_recipe]"])
    changed = [line.split(":")[0] for line in differences(own, laid_over)]
    assert all(CHANGES.fullmatch(key) for key in changed), changed
    assert not any("learning_rate" in key for key in changed)
    assert laid_over.stages == ["stage1"] and laid_over.stage1.objective.adapt
    assert not load_config([f"experiment=[{base},daformer_recipe]", "stage=source_only"]).stage1.objective.adapt
    assert laid_over.model.latent_channels == laid_over.model.encoder.width and not laid_over.model.decoder.inter_coder


@pytest.mark.parametrize("base", BASES)
def test_the_recipe_fits_the_classes_of_the_set(base: str) -> None:
    config = load_config([f"experiment=[{base},daformer_recipe]"])
    num_classes = config.data.class_set.build().num_classes
    assert max(config.stage1.objective.feature_distance_classes) < num_classes


def test_the_recipe_trains_a_plain_decoder() -> None:
    distance = "stage1.objective.feature_distance_weight"
    with pytest.raises(ValueError, match=distance):
        fresh_stage("stage1", load_config(["experiment=[demo,daformer_recipe]"]), torch.device("cpu"))
    config = load_config(["experiment=[demo,daformer_recipe]", f"{distance}=0"])
    stage = fresh_stage("stage1", config, torch.device("cpu"))
    with torch.no_grad():
        inputs = stage.prepare(random_batch(num_classes=19, numbers=range(2)), 0)
    torch.stack(list(stage.module(inputs).losses.values())).sum().backward()
    assert all(p.grad is not None for p in stage.module.parameters() if p.requires_grad)
    assert not any("connection" in name for name, _ in stage.module.named_parameters())


def test_the_feature_distance_of_merged_classes_covers_their_things() -> None:
    """Not the Cityscapes indices of the default, which mean other classes there, or none."""
    config = load_config(["experiment=carla_to_camvid"])
    names = config.data.class_set.names
    assert {names[c] for c in config.stage1.objective.feature_distance_classes} == {"sign/light", "person", "car"}
    named = load_config(["experiment=carla_to_camvid", "stage1.objective.feature_distance_classes=[8]"])
    assert named.stage1.objective.feature_distance_classes == [8]
