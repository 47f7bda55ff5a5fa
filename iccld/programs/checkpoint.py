"""`iccld checkpoint export|convert`: models made of checkpoints, and copies of checkpoints.

A checkpoint is stored independently of engine and ranks: to go on under another layout nothing needs converting.
"""

import argparse
import math
import os
from pathlib import Path

import torch

from iccld.config import Config, config_from
from iccld.durable import scratch_folder, sync
from iccld.models.model_card import build, check_sizes
from iccld.models.settings import ModelConfig
from iccld.programs.run.building import filled_stage
from iccld.programs.run.hand_off import origin_of
from iccld.runtime.checkpoint.manifest import (
    MANIFEST,
    Checkpoint,
    verify,
    write_manifest,
)
from iccld.runtime.checkpoint.pieces import Run, join_tables, share_out, write_runs
from iccld.runtime.checkpoint.store import is_torn
from iccld.stages.base import Stage
from iccld.stages.settings import Weights
from iccld.stages.table import STAGES


def run(arguments: argparse.Namespace) -> int:
    """Export or convert, and return 0. Raises ValueError if the user erred."""
    if os.path.lexists(arguments.output):
        raise ValueError(f"{arguments.output} exists; give a folder that does not.")
    checkpoint = verify(_checked_folder(arguments.folder))
    if arguments.action == "export":
        export_model(checkpoint, arguments.output, weights=Weights(arguments.weights))
    else:
        convert_checkpoint(checkpoint, arguments.output, num_files=arguments.num_files)
    return 0


def export_model(checkpoint: Checkpoint, output: Path, *, weights: Weights) -> None:
    """Write the teacher's or the student's model at this step; stage 2's needs stage 1's folder beside it."""
    manifest = checkpoint.manifest
    config = config_from(manifest.get("config"), where=str(checkpoint.folder / MANIFEST))
    stage = _filled_stage(checkpoint, config)
    model, classes = stage.assemble_models()[weights.value], config.data.class_set.build()
    origin = origin_of(config, stage=manifest["stage"], weights=weights.value, step=checkpoint.step)
    origin |= {"checkpoint": str(checkpoint.folder)}
    model.save_pretrained(output, class_names=classes.names, palette=classes.palette, origin=origin)
    print(f"{output}: {manifest['stage']}'s {weights.value} after {checkpoint.step} steps")


def _filled_stage(checkpoint: Checkpoint, config: Config) -> Stage:
    # The stage is built where the checkpoint lies, as a run directory may have moved; a copy's, where the run was.
    above = checkpoint.folder.parents[min(2, len(checkpoint.folder.parents) - 1)]
    if (above / checkpoint.manifest["stage"]).is_dir():
        config.run_dir = str(above)
    where = str(checkpoint.folder / MANIFEST)
    values = checkpoint.manifest.get("rebuilding_config")
    if not isinstance(values, dict):
        raise ValueError(f"{where} does not describe its model; give a checkpoint that train wrote.")
    check_sizes(values, where=where)
    model = build(ModelConfig, values, where=where)
    if model.encoder.pretrained:
        raise ValueError(f"{where} names an encoder, {model.encoder.pretrained!r}, in place of describing it.")
    config.model = model
    if checkpoint.manifest["stage"] not in STAGES:
        raise ValueError(f"{where}: stage={str(checkpoint.manifest['stage'])[:80]!r} must be one of {[*STAGES]}.")
    stage = filled_stage(checkpoint.manifest["stage"], config, torch.device("cpu"))
    reader = checkpoint.reader
    stage.module.load_state_dict(reader.tensors("module/"))
    for name, tensor in stage.state_dict().items():
        tensor.copy_(reader.tensor(f"stage/{name}"))
    return stage


def convert_checkpoint(checkpoint: Checkpoint, output: Path, *, num_files: int) -> None:
    """Write a copy in `num_files` files of about equal size. Its folder appears whole."""
    if num_files < 1:
        raise ValueError(f"--num-files {num_files} must be at least 1.")
    if output.name != checkpoint.folder.name:
        output = output / checkpoint.folder.name  # the name says the step
    scratch = scratch_folder(output, is_ours=is_torn)
    reader = checkpoint.reader
    sizes = {name: math.prod(reader.shape(name)) for name in reader.names()}
    nothing = {name: Run(reader.shape(name), 0, torch.empty(size, device="meta")) for name, size in sizes.items()}
    files, tables = {}, []
    for rank in range(num_files):
        mine = share_out(nothing, rank=rank, world_size=num_files)
        runs = {n: Run(r.shape, r.start, reader.read(n, r.start, r.start + len(r.data))) for n, r in mine.items()}
        facts = write_runs(scratch / f"rank_{rank:05d}.safetensors", runs)
        tables.append(facts.pop("tensors"))
        files[f"rank_{rank:05d}.safetensors"] = facts
    write_manifest(scratch, {**checkpoint.manifest, "files": files, "tensors": join_tables(tables)})
    sync(scratch)
    scratch.rename(output)
    sync(output.parent)
    print(f"{output}: {num_files} files")


def _checked_folder(folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is no checkpoint (no {MANIFEST}); give a folder like RUN_DIR/stage1/checkpoints/step_..."
        )
    return folder.resolve()
