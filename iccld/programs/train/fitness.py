"""Fitness of the nodes for a run: the checks of `runtime/faults/preflight.py` on what this run needs."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from iccld.batch_layout import BatchLayout
from iccld.config import Config, layout_of, stage_settings, trainer_settings
from iccld.data.config import OnError
from iccld.data.stream.sets import open_sets
from iccld.data.stream.workers import shared_bytes
from iccld.outcome import REFUSED
from iccld.programs.run.building import noise_of
from iccld.runtime.engine.engine import Engine
from iccld.runtime.faults.preemption import STOPPED_BY_WATCHDOG
from iccld.runtime.faults.preflight import (
    Finding,
    check_collective,
    check_device,
    check_folder,
    check_shared_memory,
    check_space,
    preflight,
)
from iccld.runtime.measure.telemetry import write_event
from iccld.runtime.ranks import Ranks
from iccld.stages.base import Stage
from iccld.stages.table import STAGES


def check_fitness(config: Config, engine: Engine) -> None:
    """Check the nodes before the first stage. Call on every rank; a fault ends all of them, see `_refuse`."""
    if not config.preflight:
        return
    run_dir, ranks = Path(config.run_dir), engine.ranks
    layouts = {name: layout_of(name, config, world_size=ranks.world_size) for name in config.stages}
    checks: dict[str, Callable[[], None]] = {
        "device": partial(check_device, engine.device),
        "run_dir": partial(check_folder, run_dir, ranks.rank),
        "shards": partial(read_shards, config),
        "shared_memory": partial(_check_workers_memory, layouts, config),
        "collective": partial(check_collective, engine.device, engine.ranks),
    }
    _refuse(preflight(checks, ranks), run_dir, ranks)


def check_room(stage: Stage, layout: BatchLayout, config: Config, ranks: Ranks) -> None:
    """Check, before a stage's first step, that there is room for its checkpoints and its workers' memory.

    The sizes are known by then. The checkpoints are `keep` ones and the one being written.
    """
    if not config.preflight:
        return
    run_dir, name = Path(config.run_dir), stage.name
    size = _checkpoint_bytes(stage) * (trainer_settings(name, config).checkpoint.keep + 1)
    check = partial(check_space, run_dir / name / "checkpoints", size, stage=name)
    checks = {
        "disk": check if ranks.is_main else lambda: None,
        "shared_memory": partial(_check_workers_memory, {name: layout}, config),
    }
    _refuse(preflight(checks, ranks), run_dir, ranks)


def _checkpoint_bytes(stage: Stage) -> int:
    """Count the bytes of the weights, of two fp32 moments of what trains, and of the stage's own state.

    The averages of an EMA profile, fp32, begin only once the engine holds the module.
    """
    held = [*stage.module.state_dict().values(), *stage.state_dict().values()]
    trained = [p for group in stage.param_groups() for p in group["params"]]
    size = sum(tensor.numel() * tensor.element_size() for tensor in held) + 8 * sum(p.numel() for p in trained)
    num_to_begin = len(stage.ema_profile.widths) if stage.profiles is None else 0
    return size + 4 * num_to_begin * sum(p.numel() for p in stage.student.parameters())


def read_shards(config: Config) -> None:
    """Read the first and the last sample of every set, wherever they lie."""
    of_target = any(STAGES[name].reads_target_labels(stage_settings(name, config)) for name in config.stages)
    labelled = {"source": True, "target": of_target, "validation": True}
    for domain, with_labels in labelled.items():
        if getattr(config.data, domain).shards:
            for part in open_sets(config.data, domain, with_labels=with_labels):
                for position in {int(part.positions[0]), int(part.positions[-1])}:
                    with suppress(ValueError) if config.data.on_error is OnError.replace else nullcontext():
                        part.reader.read(position, with_labels=with_labels)


def _check_workers_memory(layouts: Mapping[str, BatchLayout], config: Config) -> None:
    """Check, on the first rank of a node, that there is memory for what its ranks' loader workers hold at once."""
    needed = [
        shared_bytes(
            config.data,
            micro_batch_size=layout.micro_batch_size,
            num_held=layout.num_accumulation,
            noise=noise_of(name, config),
        )
        for name, layout in layouts.items()
    ]
    if os.environ.get("LOCAL_RANK", "0") == "0" and any(needed):
        check_shared_memory(max(needed) * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _refuse(found: list[Finding], run_dir: Path, ranks: Ranks) -> None:
    """End all ranks with status 2 if the user must mend something, or STOPPED_BY_WATCHDOG if another node may do."""
    if not found:
        return
    of_node = [finding for finding in found if finding.of_node]
    if ranks.is_main:
        for finding in of_node:
            print(f"preflight: {finding}", file=sys.stderr, flush=True)
            write_event(run_dir, "unfit", host=finding.host, check=finding.check, what=finding.what)
    ranks.barrier()  # nobody ends before it is said
    if len(of_node) == len(found):
        raise SystemExit(STOPPED_BY_WATCHDOG)
    raise ValueError("\n".join(str(f) for f in found if not f.of_node)) if ranks.is_main else SystemExit(REFUSED)
