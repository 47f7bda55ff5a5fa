"""Cost of a checkpoint: ours, asynchronous and not, beside accelerator.save_state and load_state.

    python tools/benchmarks/bench_checkpoint.py --json checkpoint.json    50 and 500 million parameters; 15 GiB

The model is a denoiser with AdamW's moments, on one rank. Each way has processes of its own; they take turns. `stall`
is what a training step waits, `total` the time until the work is over, `durable` until the bytes are on the disk: ours
returns no earlier, while save_state leaves them to the page cache, so that its files are synchronised and timed too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import nn

from iccld.batch_layout import BatchLayout
from iccld.durable import sync
from iccld.models.denoiser import Denoiser
from iccld.models.settings import DenoiserConfig
from iccld.runtime.checkpoint.store import CheckpointStore
from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import CheckpointConfig, EngineConfig

MODES = ("asynchronous", "synchronous", "save_state")
TIMES = ("stall_s", "total_s", "durable_s", "restore_s")
Times = dict[str, float]


def denoiser(num_params: float) -> Denoiser:
    """The narrowest of at least so many parameters."""
    for width in range(8, 4096, 8):
        with torch.device("meta"):
            model = _build(width)
        if sum(p.numel() for p in model.parameters()) >= num_params:
            return _build(width)
    raise ValueError(f"--params: no denoiser has {num_params / 1e6:g} million; use fewer.")


def _build(width: int) -> Denoiser:
    return Denoiser(config=DenoiserConfig(width=width, head_dim=width // 2), latent_channels=16, condition_channels=16)


def with_moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """A step, so that the optimiser holds what it holds in training."""
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    optimizer.zero_grad()


class Ours:
    """The trainer's way: the engine hands out what this rank holds, the store writes it."""

    def __init__(self, folder: Path, model: nn.Module, engine: Engine, *, asynchronous: bool) -> None:
        self.engine = engine
        self.engine.attach(model, [{"params": list(model.parameters()), "lr": 1e-4}], layout=BatchLayout(1, 1))
        with_moments(self.engine.backend.optimizer, model)
        self.store = CheckpointStore(folder, CheckpointConfig(asynchronous=asynchronous), self.engine.ranks)

    def save(self, step: int) -> Times:
        start = time.perf_counter()
        self.store.save(step, self.engine.runs({}), {"stage": "stage1", "layout": self.engine.resume_facts()})
        stall = time.perf_counter() - start
        self.store.wait()
        total = time.perf_counter() - start
        return {"stall_s": stall, "total_s": total, "durable_s": total}

    def load(self) -> None:
        checkpoint = self.store.newest()
        assert checkpoint is not None
        self.engine.load(checkpoint.reader, checkpoint.step, {})

    def newest(self) -> Path:
        return self.store.folders()[-1]


class SaveState:
    """Accelerate's own checkpoints, two kept as ours are."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        from accelerate.utils import ProjectConfiguration

        project = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=2)
        self.folder = folder / "checkpoints"
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), project_config=project)
        self.model, optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
        with_moments(optimizer, self.model)

    def save(self, step: int) -> Times:
        start = time.perf_counter()
        self.accelerator.save_state()
        total = time.perf_counter() - start
        for path in self.newest().rglob("*"):
            sync(path)
        return {"stall_s": total, "total_s": total, "durable_s": time.perf_counter() - start}

    def load(self) -> None:
        self.accelerator.load_state()

    def newest(self) -> Path:
        return max(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)


def measure(mode: str, num_params: float, num_saves: int) -> dict[str, Any]:
    """One way, in this process: the times of each save, and of a restore."""
    torch.manual_seed(0)
    model = denoiser(num_params)
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint-") as name, ExitStack() as stack:
        folder = Path(name)
        if mode == "save_state":
            way = SaveState(folder, model)
        else:
            engine = stack.enter_context(Engine(EngineConfig()))
            way = Ours(folder, model, engine, asynchronous=mode == "asynchronous")
        saves = [way.save(step) for step in range(1, num_saves + 1)]
        size = sum(path.stat().st_size for path in way.newest().rglob("*") if path.is_file())
        start = time.perf_counter()
        way.load()
        restore = time.perf_counter() - start
    return {
        "num_params": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "restore_s": [restore],
        **{key: [save[key] for save in saves] for key in saves[0]},
    }


def in_own_process(mode: str, num_params: float, num_saves: int) -> dict[str, Any]:
    """Measure in a process of its own, so that no way finds the memory or the caches of another."""
    command = [sys.executable, __file__, "--measure", mode, "--params", f"{num_params / 1e6}"]
    done = subprocess.run([*command, "--saves", str(num_saves)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"measuring {mode} ended with status {done.returncode}; its message stands above.")
    return json.loads(done.stdout.splitlines()[-1])


def compare(num_params: float, *, rounds: int, num_saves: int) -> dict[str, Any]:
    """The ways in turn; medians over all saves, and ratios of these to save_state's."""
    turns = [{mode: in_own_process(mode, num_params, num_saves) for mode in MODES} for _ in range(rounds)]
    figures: dict[str, Any] = {"num_params": turns[0][MODES[0]]["num_params"]}
    for mode in MODES:
        times = {key: [value for turn in turns for value in turn[mode][key]] for key in TIMES}
        figures[mode] = {key: statistics.median(values) for key, values in times.items()}
        figures[mode] |= {"bytes": turns[0][mode]["bytes"], "first_stall_s": turns[0][mode]["stall_s"][0]}
    theirs = figures["save_state"]
    for mode in MODES[:2]:
        own = figures[mode]
        own["stall_over_save_state"] = own["stall_s"] / theirs["total_s"]
        own["total_over_save_state"] = own["total_s"] / theirs["total_s"]
        own["total_over_durable_save_state"] = own["total_s"] / theirs["durable_s"]
        own["restore_over_load_state"] = own["restore_s"] / theirs["restore_s"]
    return figures


def table_of(figures: dict[str, Any]) -> Table:
    title = f"{figures['num_params'] / 1e6:.0f} million parameters with moments, one rank; medians, seconds"
    table = Table("", "stall", "first stall", "total", "durable", "restore", "GB", title=title)
    for mode in MODES:
        own = figures[mode]
        times = [own[key] for key in ("stall_s", "first_stall_s", "total_s", "durable_s", "restore_s")]
        table.add_row(mode, *(f"{seconds:.2f}" for seconds in times), f"{own['bytes'] / 1e9:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="50,500", help="millions of parameters, with commas (default %(default)s)")
    parser.add_argument("--saves", type=int, default=3, help="of each way and round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way (default %(default)s)")
    parser.add_argument("--json", type=Path, help="all figures")
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [1e6 * float(part) for part in arguments.params.split(",")]
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, sizes[0], arguments.saves)))
        return
    runs = [compare(size, rounds=arguments.rounds, num_saves=arguments.saves) for size in sizes]
    for run in runs:
        Console().print(table_of(run))
    # The goals are judged by the largest model, whose writing no cache hides.
    figures = {name: runs[-1][MODES[0]][name] for name in ("stall_over_save_state", "total_over_save_state")}
    figures |= {"runs": runs, "versions": {name: version(name) for name in ("torch", "accelerate")}}
    print(json.dumps({name: figures[name] for name in figures if name.endswith("save_state")}))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_checkpoint: {error}")
