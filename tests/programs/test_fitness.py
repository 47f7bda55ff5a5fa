"""Fitness for a run: the room that its checkpoints need."""

import torch

from iccld.config import load_config
from iccld.programs.run.building import fresh_stage
from iccld.programs.train.fitness import _checkpoint_bytes


def test_room_is_asked_for_the_averages_of_an_ema_profile_too() -> None:
    words = ["model=tiny", "stage2.objective.ema_profile={widths:[0.05,0.1],snapshot_every:10}"]
    stage = fresh_stage("stage2", load_config(words), torch.device("cpu"))
    before = _checkpoint_bytes(stage)
    stage.start()
    assert before == _checkpoint_bytes(stage) > 2 * 4 * sum(p.numel() for p in stage.student.parameters())
