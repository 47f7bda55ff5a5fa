"""Cost of an engine: peak memory, bytes sent and seconds a step of each rank, at an equal global batch.

    python tools/benchmarks/bench_engines.py --json engines.json    100 million parameters, two ranks, minutes

Stage 2 of the method trains on random images through each engine in turn, launched as a run is, by a file of
accelerate_configs/. On a GPU the memory is the device's peak; on a CPU it is the resident memory's peak above what the
process had before the model was made: of the start with its first step, and of the steps after it. The bytes are those
that a rank writes to its sockets (gloo), so on a GPU they are not counted. `ema` is the share of a step that the
teacher's update takes.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from iccld.batch_layout import BatchLayout
from iccld.config import load_config
from iccld.data.processes import usable_cpus
from iccld.models.iccld import ICCLD
from iccld.programs.run.synthetic import synthetic_batch
from iccld.reading import MIB
from iccld.runtime.engine.engine import Engine, EngineKind
from iccld.runtime.measure.host_memory import process_memory, restart_peak
from iccld.runtime.measure.peaks import wait_for
from iccld.runtime.measure.profiling import PhaseTimer
from iccld.runtime.settings import EngineConfig
from iccld.stages.adversarial import AdversarialStage, new_discriminator
from iccld.trainer import TrainingStep, attach

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("ddp", "zero1", "zero2", "fsdp2")


def make_stage(num_params: float) -> AdversarialStage:
    """Stage 2 with the narrowest denoiser of at least so many parameters, and a small encoder and decoder."""
    for width in range(16, 4096, 16):
        widths = [f"model.denoiser.width={width}", f"model.denoiser.head_dim={width // 2}"]
        whole = load_config(["model=tiny", "stage2=paper", *widths, "model.denoiser.channel_multipliers=[1,2,4]"])
        config = whole.model
        with torch.device("meta"):
            denoiser = ICCLD(config=config, num_classes=19).denoiser
        assert denoiser is not None
        if sum(p.numel() for p in denoiser.parameters()) >= num_params:
            torch.manual_seed(0)
            model, objective = ICCLD(config=config, num_classes=19), whole.stage2.objective
            discriminator = new_discriminator(model, objective, config.discriminator)
            return AdversarialStage(model, discriminator, objective, seed=0)
    raise ValueError(f"--params: no denoiser has {num_params / 1e6:g} million; use fewer.")


class Memory:
    """Peak bytes: of the device, or of this process above what it has now."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, process_memory("VmRSS")
        self.take_peak()

    def take_peak(self) -> int:
        """The peak since the last call."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak
        peak = process_memory("VmHWM") - self.before
        restart_peak()
        return peak


def _bytes_written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def measure(num_params: float, *, num_steps: int, batch_size: int, size: int) -> dict[str, Any]:
    """Train for some steps, on every rank; return the figures of all ranks. The first step is not timed."""
    with Engine(EngineConfig()) as engine:
        if engine.kind in (EngineKind.zero1, EngineKind.zero2):
            importlib.import_module("iccld.runtime.engine.zero")  # the library itself is no part of the memory
        memory = Memory(engine.device)
        stage, local = make_stage(num_params), batch_size // engine.ranks.world_size
        stage.model.to(engine.device)
        stage.teacher.module.to(engine.device)
        ranks = engine.ranks
        attach(stage, engine, BatchLayout(batch_size, local, world_size=ranks.world_size, rank=ranks.rank))
        config = load_config([f"data.crop_size=[{size},{size}]"])
        timer, sent, start_peak = PhaseTimer(engine.device), [], 0
        train = TrainingStep(stage, engine, timer)
        for step in range(num_steps + 1):
            first = step * batch_size + engine.ranks.rank * local
            (batch,) = engine.prefetch(iter([synthetic_batch(config, range(first, first + local))]))
            written = _bytes_written()
            train([batch], step)
            timer.end_step()
            wait_for(engine.device)
            sent.append(_bytes_written() - written)
            if step == 0:
                start_peak = memory.take_peak()
        steps = timer.take()[1:]
        own = {
            "peak_bytes": memory.take_peak(),
            "start_peak_bytes": start_peak,
            "sent_bytes": statistics.median(sent[1:]),
            "step_s": statistics.median(step["total"] for step in steps),
            "ema_over_step": statistics.median(step["average"] / step["total"] for step in steps),
        }
        of_ranks = engine.ranks.gather(own)
        count = sum(math.prod(p.shape) for p in stage.module.parameters())
        return {"num_params": count, "device": engine.device.type, "ranks": of_ranks}


def launch(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one engine on ranks of its own; the mean over ranks, but the most memory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        threads = max(1, usable_cpus() // arguments.ranks)
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{engine}.yaml")]
    command += ["--num_processes", str(arguments.ranks), __file__, "--ranks", str(arguments.ranks)]
    with tempfile.TemporaryDirectory(prefix="bench_engines-") as folder:
        command += ["--measure", f"{folder}/figures.json", "--params", str(arguments.params)]
        command += ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size)]
        done = subprocess.run([*command, "--size", str(arguments.size)], env=environment, check=False)
        if done.returncode:
            raise ValueError(f"measuring {engine} ended with status {done.returncode}; its message stands above.")
        figures = json.loads(Path(folder, "figures.json").read_text())
    ranks = figures.pop("ranks")
    means = {key: statistics.fmean(rank[key] for rank in ranks) for key in ranks[0]}
    peaks = {key: max(rank[key] for rank in ranks) for key in ("peak_bytes", "start_peak_bytes")}
    return {**figures, **means, **peaks}


def table_of(figures: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> Table:
    first = next(iter(figures.values()))
    count, device = f"{first['num_params'] / 1e6:.0f} million parameters", first["device"]
    title = f"{count}, {arguments.ranks} ranks ({device}), global batch {arguments.batch_size}"
    table = Table(
        "", "peak MiB a rank", "at the start", "MiB sent a rank and step", "s a step", "EMA, % of a step", title=title
    )
    for engine, own in figures.items():
        sent = "" if device == "cuda" else f"{own['sent_bytes'] / MIB:.0f}"
        share = f"{100 * own['ema_over_step']:.2f}"
        peaks = [f"{own[key] / MIB:.0f}" for key in ("peak_bytes", "start_peak_bytes")]
        table.add_row(engine, *peaks, sent, f"{own['step_s']:.2f}", share)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--params", type=float, default=100, help="millions, of the denoiser (default %(default)s)")
    add("--ranks", type=int, default=2, help="default %(default)s")
    add("--batch-size", type=int, default=4, help="samples a step over all ranks (default %(default)s)")
    add("--size", type=int, default=256, help="side of the images in pixels (default %(default)s)")
    add("--steps", type=int, default=5, help="that are timed (default %(default)s)")
    add("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="default: all")
    add("--json", type=Path, help="all figures")
    add("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.batch_size % arguments.ranks or arguments.size % 32:
        parser.error("--batch-size must be a multiple of --ranks, and --size of 32.")
    if arguments.measure:
        options = {"num_steps": arguments.steps, "batch_size": arguments.batch_size, "size": arguments.size}
        figures = measure(1e6 * arguments.params, **options)
        arguments.measure.write_text(json.dumps(figures))  # the same on every rank
        return
    figures = {engine: launch(engine, arguments) for engine in arguments.engines}
    Console().print(table_of(figures, arguments))
    if arguments.json:
        settings = {name: vars(arguments)[name] for name in ("params", "ranks", "batch_size", "size", "steps")}
        versions = {name: version(name) for name in ("torch", "accelerate", "deepspeed")}
        whole = {"engines": figures, "settings": settings, "versions": versions}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_engines: {error}")
