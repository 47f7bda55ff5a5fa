"""Called on two ranks, each with data of its own; asserts what must hold of one engine's step there."""

import copy
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from iccld.diagnostics import diagnose
from iccld.evaluation import evaluate
from iccld.labels import CITYSCAPES_19
from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import EngineConfig
from iccld.settings import EvaluationConfig
from iccld.stages.base import StageInputs
from tests.factory import layout_for, random_batch
from tests.models.factory import trained_model
from tests.stages.test_adversarial import make_stage, two_optimiser_step


def share(engine: Engine, inputs: StageInputs) -> StageInputs:
    total = engine.ranks.sum_values(inputs.denominators)
    return inputs._replace(denominators={name: value / engine.ranks.world_size for name, value in total.items()})


def check_two_optimisers(engine: Engine) -> None:
    """One module, one engine and one backward equal two DDP models with an optimiser each, to the bit."""
    single, double = make_stage(), make_stage()
    engine.attach(single.module, single.param_groups(), layout=layout_for(engine, 1))
    *denoiser_groups, discriminator_group = copy.copy(double.param_groups())
    optimisers = [torch.optim.AdamW(groups, fused=True) for groups in (denoiser_groups, [discriminator_group])]
    reference = double.module
    for name in ("denoiser", "discriminator"):
        setattr(reference, name, DistributedDataParallel(getattr(reference, name), gradient_as_bucket_view=True))
    for step in range(6):
        with torch.no_grad():
            first = 8 * step + 4 * engine.ranks.rank  # each rank has samples of its own
            inputs = share(engine, single.prepare(random_batch(num_classes=19, numbers=range(first, first + 4)), step))
        with engine.micro_batch(is_last=True):
            losses = engine.module(inputs).losses
            engine.backward(torch.stack(list(losses.values())).sum())
        engine.step()
        two_optimiser_step(double, inputs, optimisers)
    for name, value in single.module.state_dict().items():
        part, rest = name.split(".", 1)
        assert torch.equal(value, double.module.state_dict()[f"{part}.module.{rest}"]), name


def check_equal_weights(engine: Engine) -> None:
    """After steps on different data every rank holds the same weights: gradients were exchanged."""
    stage = make_stage()
    before = torch.cat([p.detach().flatten() for p in stage.module.parameters()])
    engine.attach(stage.module, stage.param_groups(), layout=layout_for(engine, 2))
    for i in range(4):
        numbers = range(100 * engine.ranks.rank + 4 * i, 100 * engine.ranks.rank + 4 * i + 4)
        with torch.no_grad():
            inputs = stage.prepare(random_batch(num_classes=19, numbers=numbers), 0)
        is_last = i % 2 == 1
        with engine.micro_batch(is_last=is_last):
            losses = engine.module(inputs).losses
            engine.backward(torch.stack(list(losses.values())).sum())
        if is_last:
            engine.step()
    weights = torch.cat([p.detach().flatten() for p in stage.module.parameters()])
    assert not torch.equal(weights, before)
    for other in engine.ranks.gather(weights):
        assert torch.equal(weights, other)


def check_evaluation(engine: Engine) -> None:
    """Seven images on two ranks are scored as on one, to the last count."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "image": torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8).numpy(),
            "labels": torch.randint(0, 19, (20, 24), generator=generator, dtype=torch.uint8).numpy(),
            "key": str(number),
            "number": number,
        }
        for number in range(7)
    ]
    weights = torch.randn(19, 3, generator=generator)

    def predict(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.einsum("kc,bchw->bkhw", weights, images)

    config = EvaluationConfig()
    options = {"class_set": CITYSCAPES_19, "config": config}
    mine = samples[engine.ranks.rank :: engine.ranks.world_size]
    assert evaluate(mine, predict, **options, all_reduce=engine.ranks.sum) == evaluate(samples, predict, **options)


def check_diagnostics(engine: Engine) -> None:
    """Three images on two ranks have the figures of one, to the last count."""
    model, student = (trained_model(num_classes=19, seed=seed) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "image": torch.randint(0, 256, (16, 24, 3), generator=generator, dtype=torch.uint8).numpy(),
            "labels": torch.randint(0, 19, (16, 24), generator=generator, dtype=torch.uint8).numpy(),
            "number": number,
        }
        for number in range(3)
    ]
    pairs = list(zip(samples, samples[1:] + samples[:1], strict=True))
    options = {"student": student, "class_set": CITYSCAPES_19, "config": EvaluationConfig(), "seed": 0}
    mine = pairs[engine.ranks.rank :: engine.ranks.world_size]
    assert diagnose(mine, model, **options, all_reduce=engine.ranks.sum) == diagnose(pairs, model, **options)


def main(done: str) -> None:
    for check in (check_two_optimisers, check_equal_weights, check_evaluation, check_diagnostics):
        with Engine(EngineConfig()) as engine:
            assert engine.ranks.world_size == 2
            check(engine)
    Path(done, f"step_{engine.ranks.rank}").touch()
