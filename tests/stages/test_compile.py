"""Compiled steps: as many graphs as there are kinds of call, none made after warm-up, the losses those of eager."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from iccld.models.blocks import ResidualBlock, SelfAttention
from iccld.models.denoiser import Denoiser
from iccld.models.iccld import ICCLD
from iccld.models.settings import DenoiserConfig
from iccld.runtime.engine import compilation
from iccld.runtime.engine.compilation import compile_in_place, repeated_blocks
from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import Compile, EngineConfig, Precision
from iccld.stages.base import Stage
from iccld.stages.segmentation import SegmentationStage
from iccld.stages.settings import SegmentationConfig
from iccld.uda.settings import CorruptionConfig
from tests.factory import layout_for, random_batch, tiny_model_config
from tests.stages.test_adversarial import make_stage as make_adversarial

WARM_START = 1
NUM_STEPS = 5


def make_segmentation(**options: Any) -> SegmentationStage:
    torch.manual_seed(0)
    model = ICCLD(config=tiny_model_config(), num_classes=19, with_denoiser=False)
    settings = {"warm_start_steps": WARM_START, "confidence_threshold": 0.055, **options}
    return SegmentationStage(model, SegmentationConfig(**settings), seed=0)


STAGES = {
    "segmentation": make_segmentation,
    "own pseudo-labels": lambda: make_segmentation(use_teacher=False),
    "every option": lambda: make_segmentation(
        flip_teacher=True, class_thresholds=0.06, class_balance=0.5, corruption=CorruptionConfig(strength=1.0)
    ),
    "adversarial": lambda: make_adversarial(adversarial_ramp_steps=4),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(
    stage: Stage,
    *,
    compile: Compile = Compile.none,
    precision: Precision = Precision.fp32,
    config: EngineConfig | None = None,
) -> tuple[list[float], list[int]]:
    """The losses of some steps of two micro-batches, and how many graphs there are after each step."""
    losses, graphs = [], []
    with Engine(config or EngineConfig(compile=compile, precision=precision)) as engine:
        options = {"replicated": stage.replicated(), "called_by_prepare": stage.called_by_prepare()}
        engine.attach(stage.module, stage.param_groups(), layout=layout_for(engine, 2), **options)
        for average, methods in stage.averages().items():
            engine.backend.shard(average, methods=methods)
        stage.start()
        counters.clear()
        for step in range(NUM_STEPS):
            engine.set_learning_rate(1.0 / (step + 1))
            for i in range(2):
                first = 1000 * engine.ranks.rank + 4 * step + 2 * i
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
    """Segment an image of another size, as scoring between steps does."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = stage.assemble_models()["teacher"].segment(torch.rand(1, 3, 40 + 8 * step, 72))
    assert logits.shape[-2:] == (40 + 8 * step, 72)


@pytest.mark.slow
@pytest.mark.parametrize("how", [Compile.blocks, Compile.whole])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("name", STAGES)
def test_no_graph_is_made_after_warm_up(name: str, precision: Precision, how: Compile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    exact, _ = train(STAGES[name](), precision=precision)
    losses, graphs = train(STAGES[name](), compile=how, precision=precision)
    assert losses == pytest.approx(exact, rel=1e-5)
    num_called = 2 if name == "adversarial" else 3  # the module and what has no gradient; there, nothing is decoded
    assert graphs[-1] == graphs[WARM_START] >= num_called, graphs
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [Compile.blocks, Compile.whole])
@pytest.mark.parametrize("name", ["segmentation", "adversarial"])
def test_the_real_compiler_trains_alike(name: str, how: Compile):
    exact, _ = train(STAGES[name]())
    losses, graphs = train(STAGES[name](), compile=how)
    assert losses == pytest.approx(exact, rel=1e-4)
    assert graphs[-1] == graphs[WARM_START]


def denoiser_of(num_blocks: int) -> Denoiser:
    sizes = {"width": 16, "channel_multipliers": [1, 2], "num_blocks": num_blocks, "attention_levels": [1]}
    return Denoiser(config=DenoiserConfig(**sizes, head_dim=16), latent_channels=4, condition_channels=4)


def test_blocks_are_the_layers():
    blocks = repeated_blocks(denoiser_of(num_blocks=2))
    assert {type(block) for block in blocks} == {ResidualBlock, SelfAttention}
    assert len(blocks) == 4 * 2 + 2 * 2 + 3  # residual blocks of two levels down and up, attention of one, the middle
    encoder = make_segmentation().module.encoder
    layers = [layer for layer in repeated_blocks(encoder) if "Segformer" in type(layer).__name__]
    assert len(layers) == sum(encoder.backbone.config.depths)


def test_repeating_a_block_makes_no_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    made = []
    for num_blocks in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        denoiser = denoiser_of(num_blocks)
        inputs = torch.rand(2, 4, 8, 16), torch.tensor([3, 999]), torch.rand(2, 4, 8, 16)
        expected = denoiser(*inputs).noise_pred
        compile_in_place([denoiser], Compile.blocks)
        torch.testing.assert_close(denoiser(*inputs).noise_pred, expected)
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == made[1] > 0, made


@pytest.mark.parametrize("deterministic", [True, False])
def test_inductor_is_told_to_be_deterministic(deterministic: bool):
    """Inductor reads the environment when it is imported, which is before an engine is made."""
    import torch._inductor.config as inductor

    torch.use_deterministic_algorithms(deterministic)
    try:
        with inductor.patch(deterministic=not deterministic):
            compile_in_place([], Compile.blocks)
            assert inductor.deterministic is deterministic
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("device", "how"), [("cpu", Compile.none), ("cuda", Compile.blocks)])
def test_auto_compiles_blocks_on_a_gpu(device: str, how: Compile):
    assert Compile.auto.on(device) is how
    assert Compile.whole.on(device) is Compile.whole


def test_a_copy_of_compiled_blocks_has_weights_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    denoiser = denoiser_of(num_blocks=1)
    compile_in_place([denoiser], Compile.blocks)
    twin = copy.deepcopy(denoiser)
    inputs = torch.rand(1, 4, 8, 8), torch.tensor([3]), torch.rand(1, 4, 8, 8)
    before = denoiser(*inputs).noise_pred
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(denoiser(*inputs).noise_pred, before)
    assert not torch.equal(twin(*inputs).noise_pred, before)
