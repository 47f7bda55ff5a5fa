"""The noise that a stage takes from its loader's workers is what it would draw itself."""

from pathlib import Path

import pytest
import torch

from iccld.batch_layout import BatchLayout
from iccld.config import load_config
from iccld.programs.run.building import build_stream, fresh_stage, noise_of
from iccld.stages.table import STAGES
from tests.factory import scene_overrides


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("latent", ["image", "mask", "residual"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_prepares_the_same_with_noise_of_the_stream(
    scene_shards: Path, tmp_path: Path, name: str, latent: str, strength: float
) -> None:
    corruption = f"{name}.objective.corruption.strength={strength}"
    more = [f"model.latent={latent}", "data.num_workers=0", corruption]
    config = load_config([*scene_overrides(scene_shards, tmp_path), *more])
    stage = fresh_stage(name, config, torch.device("cpu"))
    batch = next(build_stream(name, config, BatchLayout(2, 2)).batches(0))
    expected = noise_of(name, config)
    adds = name == "stage2" or latent == "mask" or strength > 0
    assert bool(expected) == adds and expected.keys() <= batch["source"].keys()
    without = {**batch, "source": {key: value for key, value in batch["source"].items() if key not in expected}}
    with torch.no_grad():
        ours, theirs = stage.prepare(batch, 10), stage.prepare(without, 10)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[key], theirs.tensors[key]) for key in ours.tensors)
    changed = {**batch, "source": {k: v + 1 if k in expected else v for k, v in batch["source"].items()}}
    if expected:
        with torch.no_grad():
            assert any(not torch.equal(ours.tensors[k], v) for k, v in stage.prepare(changed, 10).tensors.items())
