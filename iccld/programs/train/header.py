"""Facts of a stage's training, for the top of a terminal."""

import torch

from iccld.batch_layout import BatchLayout
from iccld.config import Config, trainer_settings
from iccld.data.processes import usable_cpus
from iccld.runtime.engine.engine import Engine
from iccld.stages.base import Stage


def header_of(stage: Stage, layout: BatchLayout, config: Config, engine: Engine) -> dict[str, str]:
    """Return the facts by name; `stage` is not yet the engine's, so that each rank holds all of it."""
    total = sum(p.numel() for p in stage.assemble_models()["student"].parameters()) if engine.ranks.is_main else 0
    trained = sum(p.numel() for group in stage.param_groups() for p in group["params"])
    accumulated = f", {layout.num_accumulation} micro-batches a rank" if layout.num_accumulation > 1 else ""
    return {
        "stage": stage.name,
        "device": _device(engine.device),
        "ranks": f"{engine.ranks.world_size}",
        "engine": engine.kind.value,
        "precision": engine.config.precision.name,
        "parameters": f"{total / 1e6:.2f} million, {trained / 1e6:.2f} million are trained",
        "steps": f"{trainer_settings(stage.name, config).num_steps} of {layout.global_batch_size} samples{accumulated}",
        "run directory": config.run_dir,
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} of {usable_cpus()} cores"
