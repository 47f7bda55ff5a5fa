"""Records of a run: metrics.jsonl, events.jsonl, the terminal's line, wandb and TensorBoard."""

import json
import math
import secrets
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from iccld.batch_layout import BatchLayout
from iccld.durable import refuse_unless_plain, write_whole
from iccld.node import host_name
from iccld.redact import redacted
from iccld.runtime.measure.memory import peak_memory
from iccld.runtime.measure.metric_entries import FINAL, FORMAT, entries_of
from iccld.runtime.measure.profiling import Seconds, summed
from iccld.runtime.measure.telemetry import Lines, Outlet, WandbRun, write_event
from iccld.runtime.measure.tensorboard import TensorBoardRun
from iccld.runtime.measure.terminal import Terminal
from iccld.runtime.measure.throughput import RankSeconds, rates, slowest
from iccld.runtime.ranks import Ranks
from iccld.runtime.settings import Logger, MetricsConfig

LOST_SHARE = 0.02
"""A bin with less than a fiftieth of its share is as good as gone. Rare-class sampling shows some classes ten times as
often as they are: a bin must not seem lost for that."""
RARE_SHARE = 1e-4
"""A share below which the reference itself has next to nothing of a bin, so that it cannot be lost."""


class NonFiniteError(ValueError):
    """Error: a loss or a weight became NaN or infinite."""


def not_finite(stage: str, what: str) -> NonFiniteError:
    """Make the error of a stage, in which `what` happened."""
    return NonFiniteError(
        f"{stage}: {what}; nothing was saved after the last whole checkpoint. Lower the learning rate, or set "
        f"{stage}.trainer.gradient_clip."
    )


class MetricsLogger:
    """Collects a stage's losses without waiting for the device; `flush` reduces, checks and writes them.

    Every rank must record and flush the same steps, whose batches have the `layout`. A step's number is the number of
    steps done, 1 after the first. `flops`: floating-point operations of a sample in the step that begins when so many
    are done; `peak_flops`: a rank's a second (0: unknown); `names_slow_rank`: a rank's seconds tell its own work from
    what it waits for others; `terminal`: where the lines are shown.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        *,
        stage: str,
        ranks: Ranks,
        layout: BatchLayout,
        flops: Callable[[int], float] = lambda step: 0.0,
        peak_flops: float = 0.0,
        names_slow_rank: bool = True,
        terminal: Terminal | None = None,
    ) -> None:
        self.run_dir, self.config, self.stage = run_dir, config, stage
        self.ranks, self.layout = ranks, layout
        self.flops, self.peak_flops, self.names_slow_rank = flops, peak_flops, names_slow_rank
        self.terminal = terminal or Terminal()
        self._losses: dict[int, dict[str, Tensor]] = {}
        self._metrics: dict[str, Tensor] = {}
        self._lines, self._outlets = Lines(run_dir / "metrics.jsonl"), list[Outlet]()
        self.logger_id: str | None = None

    def start(self, *, step: int, logger_id: str | None, config: Mapping[str, Any]) -> None:
        """Begin or go on after `step` steps.

        What an earlier attempt logged beyond them is dropped, as it will be logged again; the other lines get the
        present format.
        """
        self.logger_id = logger_id
        if not self.ranks.is_main:
            return
        path = self.run_dir / "metrics.jsonl"
        refuse_unless_plain(path)
        if path.exists():
            entries = entries_of(path.read_text(errors="replace"))
            kept = [entry for entry in entries if entry["stage"] != self.stage or entry["step"] <= step]
            write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        if self.config.with_wandb:
            self._outlets.append(self._wandb(config))
        if Logger.tensorboard in self.config.loggers:
            self._outlets.append(board := TensorBoardRun())
            board.start(self.run_dir, self.stage, step=step)

    def _wandb(self, config: Mapping[str, Any]) -> WandbRun:
        """The stage's run of wandb, which goes on under the id that it has."""
        self.logger_id, run = self.logger_id or secrets.token_hex(4), WandbRun()
        run.start(
            self.config.wandb,
            project=self.config.wandb_project,
            id=self.logger_id,
            name=f"{self.run_dir.name}/{self.stage}",
            dir=self.run_dir,
            config=redacted({**config, "data": _without_storage(config.get("data", {}))}),
        )
        return run

    def record(self, step: int, losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        """Keep this rank's mean losses and metrics (`StageOutput`) of a step; nothing is read from the device."""
        self._losses[step] = dict(losses)
        for name, value in metrics.items():
            self._metrics[name] = self._metrics[name] + value if name in self._metrics else value

    def is_due(self, step: int) -> bool:
        return step % self.config.log_every == 0

    def flush(
        self,
        *,
        num_steps: int,
        take_timings: Callable[[], list[Seconds]],
        counters: Mapping[str, int] | None = None,
        facts: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        """Reduce over ranks, check that every loss is finite, write one line. Raises NonFiniteError.

        `take_timings` gives the seconds of this rank's steps by phase; it is asked when the losses have been read, and
        the device with them.
        `counters` are this rank's sums since the start, of the same names on every rank; their totals are written.
        `facts` are scalars of the last step that are alike on all ranks; those that are not finite are left out.
        """
        if not self._losses:
            return
        flat = {f"{step:09d}/{name}": loss for step, losses in self._losses.items() for name, loss in losses.items()}
        reduced = {key: float(total) / self.ranks.world_size for key, total in self.ranks.sum_values(flat).items()}
        metrics = self._summed_metrics()
        steps = sorted(self._losses)
        self._losses, self._metrics = {}, {}
        self._refuse_unless_finite(reduced)
        last = {key.split("/", 1)[1]: value for key, value in reduced.items() if int(key.split("/", 1)[0]) == steps[-1]}
        entry = {"stage": self.stage, "step": steps[-1], "loss": sum(last.values())}
        entry |= {f"loss/{name}": value for name, value in last.items()}
        entry |= metrics
        values = {name: float(value) for name, value in (facts or {}).items()}
        entry |= {name: value for name, value in values.items() if math.isfinite(value)}
        entry |= self._totals(counters or {})
        entry |= self._rates(take_timings(), flat, steps)
        self.write(entry)
        if self.ranks.is_main:
            self.terminal.progress(entry, num_steps)

    def _refuse_unless_finite(self, losses: Mapping[str, float]) -> None:
        for key, value in losses.items():
            if not math.isfinite(value):
                step, name = int(key.split("/", 1)[0]), key.split("/", 1)[1]
                size = self.layout.global_batch_size
                first, last = (step - 1) * size, step * size - 1
                what = f"loss {name!r} is {value} in step {step}, samples {first}-{last} of each stream"
                raise not_finite(self.stage, what)

    def _summed_metrics(self) -> dict[str, Any]:
        """Return the window's metrics over all ranks, as a line has them; without those that counted nothing."""
        pairs = {name: value for name, value in self._metrics.items() if value.dim() == 1}
        histograms = {name: value for name, value in self._metrics.items() if value.dim() == 2}
        sums = {name: value.tolist() for name, value in self.ranks.sum_values(pairs).items()}
        entry: dict[str, Any] = {name: total / count for name, (total, count) in sums.items() if count}
        for name, (counts, reference) in self.ranks.sum_values(histograms).items():
            entry |= compared(name, counts.tolist(), reference.tolist())
        return entry

    def _rates(self, timed: list[Seconds], losses: Mapping[str, Tensor], steps: Sequence[int]) -> dict[str, Any]:
        """Compute how fast the ranks were in the steps; rank 0's seconds also go into events.jsonl."""
        device = next(iter(losses.values())).device
        own = RankSeconds(host_name(), summed(timed), peak_memory(device))
        ranks = self.ranks.gather(own)
        if not timed:
            return {}
        seconds = {name: round(value, 3) for name, value in own.seconds.items()}
        self.event("progress", step=steps[-1], num_steps=len(timed), seconds=seconds)
        flops = statistics.fmean(self.flops(step - 1) for step in steps)
        facts = {"global_batch_size": self.layout.global_batch_size, "flops": flops, "peak_flops": self.peak_flops}
        slow = slowest(ranks, len(timed)) if self.names_slow_rank and len(ranks) > 1 else {}
        return rates(ranks, len(timed), **facts) | slow

    def _totals(self, counters: Mapping[str, int]) -> dict[str, int]:
        """Return the sums over ranks, without those that are 0; the hosts add, as fp32 would round bytes."""
        ranks = self.ranks.gather(dict(counters)) if counters else []
        sums = {name: sum(rank[name] for rank in ranks) for name in counters}
        return {f"data/{name}": total for name, total in sums.items() if total}

    def write(self, entry: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to the other loggers on the axis `step`."""
        if not self.ranks.is_main:
            return
        self.terminal.scored(entry)
        self._lines.add({"format": FORMAT, **entry})
        facts = {name: value for name, value in entry.items() if name != "stage"}
        for outlet in self._outlets:
            outlet.log(facts, step=entry["step"])

    def picture(self, name: str, image: np.ndarray, *, step: int) -> None:
        """A picture `(H, W, 3)` uint8 to the loggers that take pictures."""
        for outlet in self._outlets:
            outlet.picture(name, image, step=step)

    def event(self, kind: str, **facts: Any) -> None:
        """Write one line of events.jsonl: what happened to the run, and when."""
        if self.ranks.is_main:
            write_event(self.run_dir, kind, stage=self.stage, **facts)
            self.terminal.event(kind, facts)

    def owes_scores(self, step: int) -> bool:
        """Tell, on the main rank, whether the step was logged without the scores of `evaluate` after it."""
        path = self.run_dir / "metrics.jsonl"
        if not self.ranks.is_main or not path.exists():
            return False
        entries = [
            entry for entry in entries_of(path.read_text()) if (entry["stage"], entry["step"]) == (self.stage, step)
        ]
        return any("loss" in entry for entry in entries) and all(
            "loss" in entry or any(name.startswith(FINAL) for name in entry) for entry in entries
        )

    def close(self) -> None:
        for outlet in self._outlets:
            outlet.finish()


def compared(name: str, counts: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Two histograms as a line has them: half the L1 distance of their shares, in [0, 1], and the bins that are lost.

    A bin is lost whose share is below `LOST_SHARE` of its share in the reference, unless that has next to none of it
    either. Nothing where either counts nothing.
    """
    if not sum(counts) or not sum(reference):
        return {}
    shares = [(count / sum(counts), other / sum(reference)) for count, other in zip(counts, reference, strict=True)]
    distance = sum(abs(share - other) for share, other in shares) / 2
    lost = [i for i, (share, other) in enumerate(shares) if other >= RARE_SHARE and share < LOST_SHARE * other]
    return {f"{name}/distance": distance, f"{name}/lost": lost}


def _without_storage(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "storage"}
