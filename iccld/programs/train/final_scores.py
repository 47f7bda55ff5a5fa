"""Writes the scores of a run's finished stages where its curves are: metrics.jsonl and the other loggers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from iccld.config import Config, layout_of, to_dict, trainer_settings
from iccld.programs.evaluate.results import own_results, read_results
from iccld.programs.run.metric_lines import number, read_entries
from iccld.programs.run.saved_scores import MEANS, evaluations
from iccld.runtime.checkpoint.errors import DamagedError, ForeignFormatError
from iccld.runtime.checkpoint.manifest import pointed_at, read_manifest
from iccld.runtime.measure.metric_entries import FINAL
from iccld.runtime.measure.metrics import MetricsLogger
from iccld.runtime.ranks import Ranks


def log_final_scores(config: Config, ranks: Ranks) -> None:
    """Write a line for each stage that the run has trained and scored, unless it is there. Call on one rank."""
    path = own_results(config)
    results = read_results(path) if path.exists() else {}
    entries = read_entries(Path(config.run_dir))
    for stage in config.stages:
        step = trainer_settings(stage, config).num_steps
        own = [entry for entry in entries if (entry["stage"], entry["step"]) == (stage, step)]
        values = dict(_values(stage, results))
        if values and not any(name.startswith(FINAL) for entry in own for name in entry):
            _write(stage, step, values, config, ranks)


def _write(stage: str, step: int, values: Mapping[str, float], config: Config, ranks: Ranks) -> None:
    layout = layout_of(stage, config, world_size=ranks.world_size, rank=ranks.rank)
    metrics = MetricsLogger(Path(config.run_dir), config.metrics, stage=stage, ranks=ranks, layout=layout)
    metrics.start(step=step, logger_id=_logger_id(Path(config.run_dir) / stage / "checkpoints"), config=to_dict(config))
    metrics.write({"stage": stage, "step": step, **values})
    metrics.close()


def _logger_id(checkpoints: Path) -> str | None:
    """The id under which wandb knows the stage's training, if a checkpoint tells."""
    try:
        return read_manifest(checkpoints / pointed_at(checkpoints)).get("logger_id")
    except (DamagedError, ForeignFormatError, OSError):
        return None


def _values(stage: str, results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The scores as `final/miou` and `final/iou/road`, of 4 denoising steps as `final/x4/miou`; controls by name."""
    own = [each for each in evaluations(results) if each.stage == stage]
    for each in own:
        part = each.control or (f"x{each.steps}" if each.steps else "")
        prefix = f"{FINAL}{part}/" if part else FINAL
        named = {name: each.scores.get(name) for name in MEANS}
        named |= {f"iou/{name}": iou for name, iou in zip(each.scores["names"], each.scores["iou"], strict=True)}
        for name, value in named.items():
            if (finite := number(value)) is not None:
                yield prefix + name, finite
