"""One rank that trains stage 2, or times its link, when it is told to: `steps N` or `link` on standard input.

It answers each with a line of JSON, and is idle in between, so that what is compared can take turns.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bench_engines import make_stage
from scaling.links import time_collectives

from iccld.batch_layout import BatchLayout
from iccld.config import load_config
from iccld.programs.run.synthetic import synthetic_batch
from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import EngineConfig
from iccld.stages.adversarial import AdversarialStage
from iccld.trainer import attach

LINK_SIZES = tuple(1 << n for n in (12, 16, 20, 22, 24, 25))


class Rank:
    """`batch_size` samples of `size` pixels a rank and step, in one micro-batch."""

    def __init__(self, engine: Engine, stage: AdversarialStage, *, batch_size: int, size: int) -> None:
        self.engine, self.stage, self.batch_size = engine, stage, batch_size
        self.config = load_config([f"data.crop_size=[{size},{size}]"])
        ranks = engine.ranks
        layout = BatchLayout(batch_size * ranks.world_size, batch_size, world_size=ranks.world_size, rank=ranks.rank)
        attach(stage, engine, layout)
        self.seconds: dict[str, float] = {}

    def step(self, number: int) -> dict[str, Any]:
        """Train once; the seconds of the whole and of its phases."""
        self.seconds = {}
        start = time.perf_counter()
        first = number * self.batch_size
        with self._phase("agree"):
            self.engine.ranks.any(False)
        with self._phase("prepare"), torch.no_grad():
            batch = synthetic_batch(self.config, range(first, first + self.batch_size))
            inputs = self.stage.prepare(batch, number)
            self.engine.ranks.sum_values(inputs.denominators)
        with self.engine.micro_batch(is_last=True):
            with self._phase("forward"):
                losses = self.engine.module(inputs).losses
            with self._phase("backward"):
                self.engine.backward(torch.stack(list(losses.values())).sum())
        with self._phase("optimizer"):
            self.engine.step()
        with self._phase("average"):
            self.stage.after_step(number)
        return {"step_s": time.perf_counter() - start, "phases": self.seconds}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def main() -> None:
    params, batch_size, size = (int(word) for word in sys.argv[1:])
    with Engine(EngineConfig()) as engine:
        rank = Rank(engine, make_stage(params), batch_size=batch_size, size=size)
        number = 0
        num_parameters = sum(p.numel() for p in rank.engine.backend.parameters().values())
        print(json.dumps({"num_parameters": num_parameters}), flush=True)
        for line in sys.stdin:
            word, *rest = line.split()
            if word == "link":
                print(json.dumps(time_collectives(sizes=LINK_SIZES, seconds=0.25)), flush=True)
                continue
            count = int(rest[0])
            print(json.dumps([rank.step(number + i) for i in range(count)]), flush=True)
            number += count


if __name__ == "__main__":
    main()
