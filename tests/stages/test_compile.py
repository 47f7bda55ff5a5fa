"""Compiled steps: as many graphs as there are kinds of call, none made after warm-up, the losses those of eager."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from iccld.models.iccld import ICCLD
from iccld.runtime import compilation
from iccld.runtime.engine import Engine, EngineConfig, Precision
from iccld.stages.base import Stage
from iccld.stages.segmentation import SegmentationConfig, SegmentationStage
from tests.factory import random_batch, tiny_model_config
from tests.stages.test_adversarial import make_stage as make_adversarial

WARM_START = 1
NUM_STEPS = 5


def make_segmentation(*, use_teacher: bool = True) -> SegmentationStage:
    torch.manual_seed(0)
    model = ICCLD(config=tiny_model_config(), num_classes=19, with_denoiser=False)
    settings = {"warm_start_steps": WARM_START, "confidence_threshold": 0.055, "use_teacher": use_teacher}
    return SegmentationStage(model, SegmentationConfig(**settings), seed=0)


STAGES = {
    "segmentation": make_segmentation,
    "own pseudo-labels": lambda: make_segmentation(use_teacher=False),
    "adversarial": lambda: make_adversarial(adversarial_ramp_steps=4),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(
    stage: Stage, *, compiled: bool, precision: Precision = Precision.fp32, config: EngineConfig | None = None
) -> tuple[list[float], list[int]]:
    """The losses of some steps of two micro-batches, and how many graphs there are after each step."""
    losses, graphs = [], []
    with Engine(config or EngineConfig(compile=compiled, precision=precision)) as engine:
        options = {"replicated": stage.replicated(), "frozen": stage.frozen()}
        engine.attach(stage.module, stage.param_groups(), num_accumulation=2, **options)
        for average, methods in stage.averages().items():
            engine.backend.shard(average, methods=methods)
        stage.start()
        counters.clear()
        for step in range(NUM_STEPS):
            engine.set_learning_rate(1.0 / (step + 1))
            for i in range(2):
                first = 1000 * engine.rank + 4 * step + 2 * i
                batch = random_batch(num_classes=19, numbers=range(first, first + 2))
                with torch.no_grad(), engine.autocast():
                    inputs = stage.prepare(batch, step)
                with engine.micro_batch(is_last=i == 1):
                    loss = torch.stack(list(engine.module(inputs).losses.values())).sum()
                    engine.backward(loss)
                losses.append(float(loss.detach()))
            engine.step()
            stage.after_step(step)
            graphs.append(counters["stats"]["unique_graphs"])
            if not engine.is_sharded:
                score(stage, step)
        engine.detach()
    return losses, graphs


def score(stage: Stage, step: int) -> None:
    """As scoring between steps does: an image of another size."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = stage.models()["teacher"].segment(torch.rand(1, 3, 40 + 8 * step, 72))
    assert logits.shape[-2:] == (40 + 8 * step, 72)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("name", STAGES)
def test_no_graph_is_made_after_warm_up(name: str, precision: Precision, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    exact, _ = train(STAGES[name](), compiled=False, precision=precision)
    losses, graphs = train(STAGES[name](), compiled=True, precision=precision)
    assert losses == pytest.approx(exact, rel=1e-5)
    num_called = 2 if name == "adversarial" else 3  # the module and what is frozen; there, nothing is decoded
    assert graphs[-1] == graphs[WARM_START] >= num_called, graphs
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmentation", "adversarial"])
def test_the_real_compiler_trains_alike(name: str):
    exact, _ = train(STAGES[name](), compiled=False)
    losses, graphs = train(STAGES[name](), compiled=True)
    assert losses == pytest.approx(exact, rel=1e-4)
    assert graphs[-1] == graphs[WARM_START]
