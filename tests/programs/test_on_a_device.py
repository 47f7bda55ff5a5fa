"""A device that is not the host's: device meta, like a GPU, refuses host tensors beside its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from iccld.config import load_config
from iccld.programs.run.building import build_stage
from iccld.programs.train.train import measure_latents
from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure.flops import on_meta
from iccld.runtime.settings import EngineConfig
from tests.factory import scene_overrides

META = torch.device("meta")


def test_a_finished_stage_measures_its_latent_on_its_device(scene_shards: Path, tmp_path: Path) -> None:
    config = load_config(scene_overrides(scene_shards, tmp_path))
    stage = on_meta(build_stage("stage1", config, torch.device("cpu")))
    measured: list[Any] = []
    for model in stage.assemble_models().values():
        model.set_latent_statistics = lambda **statistics: measured.append(SimpleNamespace(**statistics))
    with Engine(EngineConfig()) as engine:
        engine.device = META
        measure_latents(stage, config, engine)
    assert len(measured) == 2 and all(found.z_0.device == META for found in measured)
