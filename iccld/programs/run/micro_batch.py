"""`micro_batch_size: auto`: the largest size that divides a rank's part of the global batch and fits in its memory.

A size is tried on a stage that is thrown away, with the run's own first samples, in two steps that need the memory of
the loop's steps; the second has the optimiser's moments in place. DDP on GPUs tries by bisection until memory is out,
within `memory.share` of what was free. Its steps have no collective, in which a rank that fails alone would leave the
others; those of DDP's constructor and of its buckets come before them. Elsewhere (a CPU, where the kernel may kill a
process that needs too much; sharded engines, which need collectives) the size grows step by step, and a line through
the peaks predicts the next peak. Scores in mid-training are not tried.

A resumed run keeps the size of its newest checkpoint while engine, precision, activation checkpointing and number of
ranks are the same.
"""

import contextlib
import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from iccld.batch_layout import AUTO, BatchLayout
from iccld.config import Config, layout_of
from iccld.eager import without_compiled_code
from iccld.node import host_name
from iccld.programs.run.out_of_memory import explained_out_of_memory
from iccld.runtime.batches import map_tensors
from iccld.runtime.checkpoint.manifest import STEP_FOLDER, pointed_at, read_manifest
from iccld.runtime.engine.engine import Engine, EngineKind
from iccld.runtime.faults.watchdog import Watchdog
from iccld.runtime.measure import memory
from iccld.runtime.measure.profiling import PhaseTimer
from iccld.runtime.measure.telemetry import write_event
from iccld.settings import TrainerConfig
from iccld.stages.base import Stage
from iccld.trainer import TrainingStep, attach

NUM_COMPUTED = 2  # micro-batches of a trial's step; the others only take their memory


@dataclass
class Trials:
    """Trials of sizes. `build` makes a stage for a trial; `batch` returns so many of a rank's first samples."""

    settings: TrainerConfig
    config: Config
    engine: Engine
    watchdog: Watchdog
    build: Callable[[], Stage]
    batch: Callable[[int], Mapping[str, Any]]
    peaks: dict[int, float] = field(default_factory=dict)  # bytes, by size; infinite where memory was out

    @property
    def is_local(self) -> bool:
        """Tell whether a step can do without a collective."""
        return self.engine.kind is EngineKind.ddp

    def fits(self, size: int) -> bool:
        """Tell whether all ranks had memory for two steps. Call on every rank."""
        engine, stage, failed = self.engine, None, False
        try:
            stage = self.build()
            memory.restart_peak(engine.device)
            self._train(stage, size)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            failed = True
            if size == 1:
                if stage is None:  # the model alone is too large
                    raise
                layout = self._layout(1, self.settings.global_batch_size)
                with explained_out_of_memory(stage, layout, self.config, engine, watchdog=self.watchdog):
                    raise
            traceback.clear_frames(error.__traceback__)
        self.peaks[size] = float("inf") if engine.ranks.any(failed) else float(memory.peak_memory(engine.device))
        del stage
        engine.detach()
        gc.collect()
        memory.restart_peak(engine.device)
        self.watchdog.tick()
        return self.peaks[size] < float("inf")

    def _layout(self, size: int, global_batch_size: int) -> BatchLayout:
        ranks = self.engine.ranks
        return BatchLayout(global_batch_size, size, world_size=ranks.world_size, rank=ranks.rank)

    def _train(self, stage: Stage, size: int) -> None:
        engine, settings, of_ranks = self.engine, self.settings, size * self.engine.ranks.world_size
        num_micro_batches = -(-settings.global_batch_size // of_ranks)
        layout = self._layout(size, num_micro_batches * of_ranks)
        attach(stage, engine, layout, gradient_clip=settings.gradient_clip)
        batches = _copies(self.batch(size), num_micro_batches, engine.device)
        step = settings.num_steps - 1  # the last step has every loss; the first ones may lack some
        saved, training_step = [], TrainingStep(stage, engine, PhaseTimer(engine.device))
        with without_compiled_code():  # to compile for every size takes longer than to train
            for _ in range(2):
                with torch.no_grad(), engine.autocast():
                    inputs = [stage.prepare(batch, step) for batch in batches[:NUM_COMPUTED]]
                waiting = _copies(inputs[0]._asdict(), num_micro_batches - len(inputs), engine.device)
                training_step.accumulate(inputs, is_shared=not self.is_local)
                engine.step()
                stage.after_step(step)
                if engine.device.type == "cpu" and not saved:  # what a save copies stays in the host's memory
                    saved = [run.data.clone() for run in engine.runs(stage.state_dict()).values()]
                del inputs, waiting


def _copies(tensors: Mapping[str, Any], count: int, device: torch.device) -> list[Any]:
    return [map_tensors(tensors, lambda tensor: tensor.to(device, copy=True)) for _ in range(count)]


def choose_layout(stage_name: str, trials: Trials) -> BatchLayout:
    """Divide the batch; `auto` becomes a number that is the same on all ranks.

    Call on every rank, with no module attached. Nothing of the run is changed: the stage comes from its seed, and every
    draw from its sample's number.
    """
    settings, ranks, run_dir = trials.settings, trials.engine.ranks, Path(trials.config.run_dir)
    layout = layout_of(stage_name, trials.config, world_size=ranks.world_size, rank=ranks.rank)
    if settings.micro_batch_size != AUTO:
        return layout
    before = ranks.from_main(_size_before(run_dir / stage_name, settings, trials))  # as rank 0 sees it
    size, how = (before, "as before") if before else _choose(trials)
    layout = replace(layout, micro_batch_size=size)
    if ranks.is_main:
        tried = {str(tried): peak if peak < float("inf") else None for tried, peak in trials.peaks.items()}
        facts = {"stage": stage_name, "chosen": size, "how": how, "peak_bytes": tried}
        write_event(run_dir, "micro_batch_size", **facts, num_accumulation=layout.num_accumulation)
        print(f"{stage_name}.trainer.micro_batch_size: auto -> {size} ({how})", flush=True)
    return layout


def _size_before(folder: Path, settings: TrainerConfig, trials: Trials) -> int:
    """Return the size that the newest checkpoint was trained with; 0 if there is none, or what needs memory differs."""
    engine, model = trials.engine, trials.config.model
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        name = pointed_at(folder / "checkpoints")
        manifest = read_manifest(folder / "checkpoints" / name) if STEP_FOLDER.fullmatch(name) else {}
        layout, parts = manifest["layout"], manifest["config"]["model"]
        kept = [parts[part].get("activation_checkpointing", False) for part in ("encoder", "denoiser")]
        now = [model.encoder.activation_checkpointing, model.denoiser.activation_checkpointing]
        now += [engine.kind.value, engine.ranks.world_size, engine.config.precision.name]
        if [*kept, layout["engine"], layout["world_size"], layout["precision"]] == now:
            return settings.global_batch_size // (engine.ranks.world_size * layout["num_accumulation"])
    return 0


def _choose(trials: Trials) -> tuple[int, str]:
    """Choose a size that all ranks bear; return it, and how it was found."""
    ranks, device, share = trials.engine.ranks, trials.engine.device, trials.config.memory.share
    sizes = divisors(trials.settings.layout(world_size=ranks.world_size).rank_batch_size)
    if sizes == [1]:
        return 1, "no other divides a rank's samples"
    trials.fits(1)  # first, so that libraries, threads and communicators have taken theirs
    num_sharing = ranks.gather(host_name()).count(host_name())
    free = memory.free_memory(device, num_sharing=num_sharing)
    limit = memory.taken_memory(device) + share * free
    said = f"{100 * share:.0f} % of the {memory.gib(free)} that were free to a rank"
    if device.type == "cuda" and trials.is_local:
        with memory.limited(device, int(min(ranks.gather(limit)))):
            size = largest_by_trial(sizes[1:], trials.fits) or 1
        tried = [f"{size} {'fits' if peak < float('inf') else 'does not'}" for size, peak in trials.peaks.items()]
        how = f"tried in {said}: {', '.join(tried)}"
    else:

        def reach() -> int:
            return min(ranks.gather(largest_by_line(sizes, trials.peaks, limit=limit)))

        size = largest_by_climbing(sizes, trials.fits, trials.peaks, reach=reach)
        tried = [f"{memory.gib(peak)} with {tried}" for tried, peak in trials.peaks.items() if peak < float("inf")]
        how = f"peaks of {', '.join(tried)}; the limit is {memory.gib(limit)}, with {said}"
    return size, how


def divisors(count: int) -> list[int]:
    """The numbers that divide `count`, smallest first."""
    return [size for size in range(1, count + 1) if count % size == 0]


def largest_by_trial(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Bisect ascending sizes for the largest that fits; 0 if none does."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else 0


def largest_by_climbing(
    sizes: Sequence[int], fits: Callable[[int], bool], peaks: Mapping[int, float], *, reach: Callable[[], int]
) -> int:
    """Try larger and larger ones of ascending sizes; return the largest tried that is within `reach()`, at least 1.

    `fits` adds to `peaks`, which holds that of size 1 and is infinite where memory was out. Small sizes can hide in
    what libraries took before, so that their line is too flat: no size tried is more than double the largest before
    it, or the one that follows that in `sizes`.
    """
    size = 2  # gives the line its slope, also where it does not divide the batch
    while size not in peaks:
        fits(size)
        largest = max(tried for tried, peak in peaks.items() if peak < float("inf"))
        bound = max(2 * largest, min((size for size in sizes if size > largest), default=largest))
        size = max(size for size in sizes if size == 1 or size <= min(reach(), bound))
    return size


def largest_by_line(sizes: Sequence[int], peaks: Mapping[int, float], *, limit: float) -> int:
    """The largest size within `limit` on the line through the peaks of the two largest that fit; at least 1.

    `peaks` are bytes by size, infinite for a size that did not fit: it and all above are out.
    """
    fitting = sorted(size for size in peaks if peaks[size] < float("inf"))
    failed = min((size for size in peaks if peaks[size] == float("inf")), default=float("inf"))
    low, high = fitting[-2:] if len(fitting) > 1 else (fitting[0], fitting[0])
    slope = max(peaks[high] - peaks[low], 0.0) / max(high - low, 1)
    return max(size for size in sizes if size == 1 or (size < failed and peaks[high] + (size - high) * slope <= limit))
