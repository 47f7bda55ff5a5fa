"""Snapshots of a stage's power-function averages, and models of any other average out of them.

Snapshots are `stageN/ema/step_00000100.safetensors`: tensors `ema_0.050/<parameter>` of stage 1's model, or of stage
2's denoiser, by the names of `named_parameters()`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from iccld import __version__
from iccld.config import Config
from iccld.durable import make_folder, remove_left_overs
from iccld.evaluation import EvaluationResult
from iccld.models.iccld import ICCLD
from iccld.models.model_card import CARD_NAME
from iccld.models.saved_model import save_tensors
from iccld.outcome import say
from iccld.programs.evaluate.evaluate import load_matching_model
from iccld.programs.evaluate.scoring import evaluate_predictor
from iccld.programs.run.hand_off import final_folder
from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import Compile
from iccld.stages.base import Stage
from iccld.stages.settings import Weights
from iccld.stages.table import stage_of
from iccld.uda.ema_profile import Profile, profile_error, snapshot_weights
from iccld.uda.settings import average_name


@dataclass(frozen=True)
class Snapshot:
    """File of averages after `step` optimiser steps."""

    path: Path
    step: int
    widths: tuple[float, ...]


@dataclass(frozen=True)
class Reconstruction:
    """Combination of snapshots. `profile_error` is its profile's relative distance from the wanted one."""

    wanted: Profile
    snapshots: Sequence[Snapshot]
    weights: Mapping[Profile, float]
    profile_error: float

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the reconstructed tensors, fp32. Their sums, all held at once, are in fp64: weights may be tens."""
        totals: dict[str, Any] = dict.fromkeys(names, torch.zeros((), dtype=torch.float64))
        for snapshot in self.snapshots:
            used = {average_name(w): weight for w in snapshot.widths if (weight := self._weight(snapshot, w))}
            with safe_open(snapshot.path, framework="pt") as file:
                for name in totals if used else ():
                    totals[name] = totals[name] + sum(
                        weight * file.get_tensor(f"{average}/{name}").double() for average, weight in used.items()
                    )
        return {name: total.float() for name, total in totals.items()}

    def _weight(self, snapshot: Snapshot, width: float) -> float:
        return self.weights[Profile(snapshot.step, width)]


def snapshot_name(step: int) -> str:
    """Return the file's name after `step` optimiser steps."""
    return f"step_{step:08d}.safetensors"


def write_snapshot(
    folder: Path,
    averages: Mapping[str, Tensor],
    *,
    step: int,
    widths: Sequence[float],
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write `PowerAverages.state_dict()`, its tensors full, after `step` optimiser steps; whole or not at all.

    Raises ValueError if an average is too large for `dtype` (the paper's fp16) or is not finite, OSError if the disk is
    full.
    """
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in averages.items()}
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(
            f"ema_profile: after step {step}, {', '.join(broken[:3])} is not finite in {dtype}; "
            f"look for a diverged loss, or set {folder.parent.name}.objective.ema_profile.widths=[]."
        )
    make_folder(folder, within=folder.parent)
    path = folder / snapshot_name(step)
    remove_left_overs(folder)
    metadata = {"step": str(step), "widths": json.dumps([float(width) for width in widths])}
    save_tensors(path, tensors, metadata=metadata)
    return path


def write_due_snapshot(stage: Stage, folder: Path, engine: Engine, *, step: int) -> None:
    """Write the stage's averages if that is due after `step` steps. Call on every rank."""
    profile = stage.ema_profile
    if stage.profiles is not None and step % profile.snapshot_every == 0:
        averages = engine.backend.full(stage.profiles.state_dict())
        if engine.ranks.is_main:
            try:
                write_snapshot(folder, averages, step=step, widths=profile.widths)
            except OSError as error:  # only the averages of this step are lost
                say(
                    f"ema_profile: the snapshot of step {step} cannot be written ({error}); training goes on without it"
                )


def read_snapshots(folder: Path) -> list[Snapshot]:
    """Return the folder's snapshots by step; only their headers are read.

    Raises ValueError if there is none, or one is broken, which it names.
    """
    paths = sorted(path for path in folder.glob("step_*.safetensors") if re.fullmatch(r"step_\d{8}", path.stem))
    if not paths:
        raise ValueError(
            f"{folder} holds no snapshots; train with {folder.parent.name}.objective.ema_profile.widths=[0.05,0.10] "
            f"and .snapshot_every."
        )
    return [_read_header(path) for path in paths]


def _read_header(path: Path) -> Snapshot:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
        step, widths = int(metadata["step"]), tuple(map(float, json.loads(metadata["widths"])))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a whole snapshot ({error!r}); remove it: the others will do.") from error
    missing = [
        average_name(width) for width in widths if not any(name.startswith(f"{average_name(width)}/") for name in names)
    ]
    if missing or path.name != snapshot_name(step):
        raise ValueError(
            f"{path} does not hold what it says, step {step} and widths {list(widths)}; remove it: the others will do."
        )
    return Snapshot(path, step, widths)


def reconstruction_of(snapshots: Sequence[Snapshot], *, width: float, step: int = 0) -> Reconstruction:
    """Combine snapshots to come nearest to an average of `width` after `step` steps; 0: the last snapshot's step.

    Raises ValueError if no snapshot was taken at `step`, or the width is not one.
    """
    steps = [snapshot.step for snapshot in snapshots]
    step = step or steps[-1]
    if step not in steps:
        near = sorted(steps, key=lambda other: abs(other - step))[:3]
        raise ValueError(
            f"--step {step}: no snapshot was taken there (the nearest: {', '.join(map(str, sorted(near)))}); use one."
        )
    past = [snapshot for snapshot in snapshots if snapshot.step <= step]
    profiles = [Profile(snapshot.step, w) for snapshot in past for w in snapshot.widths]
    wanted = Profile(step, width)
    weights = snapshot_weights(profiles, wanted)
    combination = dict(zip(profiles, map(float, weights), strict=True))
    return Reconstruction(wanted, past, combination, profile_error(profiles, weights, wanted))


def put_weights(module: nn.Module, reconstruction: Reconstruction) -> None:
    """Replace all parameters in place; buffers stay. Raises ValueError if the snapshots are of another module."""
    parameters = dict(module.named_parameters())
    for snapshot in reconstruction.snapshots:
        with safe_open(snapshot.path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        own = {f"{average_name(w)}/{name}": tuple(p.shape) for w in snapshot.widths for name, p in parameters.items()}
        wrong = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
        if wrong:
            raise ValueError(
                f"{snapshot.path} is of another model than the run's: {len(wrong)} averages are missing, unknown or "
                f"of another shape ({', '.join(wrong[:3])}); use snapshots and model of one run."
            )
    with torch.no_grad():
        for name, tensor in reconstruction.tensors(parameters).items():
            parameters[name].copy_(tensor)


def teacher_folder(run_dir: Path, stage: str) -> Path:
    """Return the folder of the stage's finished teacher. Raises ValueError while there is none."""
    folder = final_folder(run_dir, stage) / Weights.teacher.value
    if not (folder / CARD_NAME).is_file():
        raise ValueError(f"{run_dir} holds no finished {stage} ({folder}); let the same train command finish.")
    return folder


def write_reconstruction(run_dir: Path, stage: str, output: Path, *, width: float, step: int = 0) -> float:
    """Write a model folder like the stage's teacher, of another average; return the error of its profile.

    Everything except the averaged parameters is the finished teacher's, stage 1's statistics of the latent too. Raises
    ValueError if `output` holds something, and the errors of the functions above.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} is there already, and is not an empty folder; name a new one.")
    model = ICCLD.from_pretrained(teacher_folder(run_dir, stage))
    reconstruction = reconstruction_of(read_snapshots(run_dir / stage / "ema"), width=width, step=step)
    put_weights(stage_of(model).averaged(model), reconstruction)
    card = model.card
    assert card is not None
    origin = {
        **card.origin,
        "weights": f"average of relative width {width}",
        "width": width,
        "step": reconstruction.wanted.step,
        "profile_error": reconstruction.profile_error,
        "version": __version__,
    }
    model.save_pretrained(output, class_names=card.class_names, palette=card.palette, origin=origin)
    return reconstruction.profile_error


def sweep(config: Config, stage: str, *, widths: Sequence[float], step: int = 0) -> list[dict[str, Any]]:
    """Score the finished teacher and a reconstruction of each width on the run's validation set, in one process.

    Returns rows `{"weights", "width", "step", "profile_error", "scores": {number of denoising steps:
    EvaluationResult}}`, the teacher first, its width, step and error None. Only the first noise seed is scored.
    """
    run_dir = Path(config.run_dir)
    folder = teacher_folder(run_dir, stage)
    snapshots = read_snapshots(run_dir / stage / "ema")
    reconstructions = [reconstruction_of(snapshots, width=width, step=step) for width in widths]
    with Engine(replace(config.engine, compile=Compile.none)) as engine:  # scoring runs eagerly
        model = load_matching_model(folder, config).to(engine.device)
        rows = [_row("teacher", None, scores_by_steps(model, config, engine))]
        for reconstruction in reconstructions:
            put_weights(stage_of(model).averaged(model), reconstruction)
            rows.append(
                _row(average_name(reconstruction.wanted.width), reconstruction, scores_by_steps(model, config, engine))
            )
    return rows


def scores_by_steps(model: ICCLD, config: Config, engine: Engine) -> dict[int, EvaluationResult]:
    kind, inference, seed = stage_of(model), config.inference, config.seed
    predictors = {n: kind.predictor(model, inference, seed=seed, num_steps=n) for n in kind.num_steps(inference)}
    return {num_steps: evaluate_predictor(predict, config, engine) for num_steps, predict in predictors.items()}


def _row(name: str, reconstruction: Reconstruction | None, scores: dict[int, EvaluationResult]) -> dict[str, Any]:
    return {
        "weights": name,
        "width": reconstruction.wanted.width if reconstruction else None,
        "step": reconstruction.wanted.step if reconstruction else None,
        "profile_error": reconstruction.profile_error if reconstruction else None,
        "scores": scores,
    }
