"""Report of a training that is out of memory: one message on one rank, with remedies; then all ranks end."""

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from iccld.batch_layout import BatchLayout
from iccld.config import Config
from iccld.runtime.checkpoint.store import CheckpointStore
from iccld.runtime.engine.engine import Engine, EngineKind
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure.memory import (
    OutOfMemory,
    Parts,
    is_out_of_memory,
    record_history,
    write_snapshot,
)
from iccld.runtime.measure.telemetry import write_event
from iccld.stages.base import Stage

OF_SCORES = "evaluation.batch_size=1; or evaluation.sliding_window=true; or a smaller evaluation.image_size"
"""Settings by which scoring needs less memory."""


@contextlib.contextmanager
def explained_lack_for_scores(device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error of scoring, within the block, into ValueError with what to set."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = (str(error).strip() or repr(error)).partition("\n")[0]
        raise ValueError(f"out of memory while scoring on {device} ({asked}); set {OF_SCORES}") from error


@contextlib.contextmanager
def explained_out_of_memory(
    stage: Stage,
    layout: BatchLayout,
    config: Config,
    engine: Engine,
    *,
    watchdog: Watchdog,
    checkpoints: CheckpointStore | None = None,
) -> Iterator[None]:
    """Explain an out-of-memory error within the block: one rank raises ValueError, the others end.

    Of several ranks, the one that speaks ends its process, and so the others. A save that has begun is finished first.
    """
    record_history(engine.device, config.memory)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if engine.device.type == "cpu":  # the report needs memory, too
            traceback.clear_frames(error.__traceback__)
        if checkpoints is not None:
            with contextlib.suppress(ValueError):  # the run ends by the lack of memory, not by a failed save
                checkpoints.wait()
        if engine.ranks.world_size > 1:
            watchdog.refusal.claim()
        message = _leave_word(error, parts_held(stage, engine), Path(config.run_dir), watchdog, engine)
        found = remedies(stage, layout, config, engine, phase=watchdog.phase_now)
        message += f"; set {'; or '.join(found)}"
        if engine.ranks.world_size > 1:
            watchdog.refusal.refuse(message)
        raise ValueError(message) from None


def _leave_word(error: BaseException, parts: Parts, run_dir: Path, watchdog: Watchdog, engine: Engine) -> str:
    """Write the snapshot and the event; return what happened, in words."""
    found = OutOfMemory.of(error, parts, engine.device)
    message, facts = f"out of memory: {watchdog} {found}", dataclasses.asdict(found)
    stem = run_dir / "profile" / f"out_of_memory_rank_{engine.ranks.rank:05d}"
    path = write_snapshot(stem, parts, {"what": message, **facts})
    write_event(run_dir, "out_of_memory", rank=engine.ranks.rank, what=message, **facts)
    return f"{message}; who holds what is in {path}"


def parts_held(stage: Stage, engine: Engine) -> Parts:
    """Return what this rank holds of the training, by part."""
    attached = hasattr(engine, "backend")
    trained = engine.backend.held() if attached else {"weights": stage.module.state_dict(keep_vars=True)}
    known = {id(tensor) for tensor in trained["weights"].values()}
    modules = [module for module in vars(stage).values() if isinstance(module, nn.Module)]
    frozen = {id(p): (name, p) for module in modules for name, p in module.named_parameters() if id(p) not in known}
    return {**trained, "averages": stage.state_dict(), "frozen weights": dict(frozen.values())}


def remedies(stage: Stage, layout: BatchLayout, config: Config, engine: Engine, *, phase: str) -> Iterator[str]:
    """List settings that need less memory; those that change least come first."""
    if phase == "evaluate":
        yield OF_SCORES
        return
    if phase == "finish":  # one rank measures by batches of its own, without gradient
        yield "accelerate_configs/fsdp2.yaml with more ranks; or free memory of the device; the same command goes on"
        return
    of_rank, now = layout.rank_batch_size, layout.micro_batch_size
    if smaller := max((size for size in range(1, now) if of_rank % size == 0), default=0):
        yield (
            f"{stage.name}.trainer.micro_batch_size={smaller} "
            f"(accumulation {layout.num_accumulation} -> {of_rank // smaller}, "
            f"the global batch stays {layout.global_batch_size}) or auto"
        )
    for part, module in stage.module.named_children():
        if getattr(module, "can_recompute", False) and not getattr(config.model, part).activation_checkpointing:
            yield f"model.{part}.activation_checkpointing=true"
    if engine.accelerator.mixed_precision == "no":
        yield "engine.precision=bf16"
    if engine.kind is not EngineKind.fsdp2:
        yield "accelerate_configs/fsdp2.yaml with more ranks, which share weights, moments and averages"
    yield "a smaller data.crop_size, which is another experiment"
