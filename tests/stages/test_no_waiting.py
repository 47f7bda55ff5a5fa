"""A step makes the host wait for the device nowhere: nothing is read from it, and what is sent to it is sent ahead."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from iccld.models.settings import ConditionKind, LatentKind
from iccld.runtime.batches import map_tensors
from iccld.runtime.engine.engine import Engine
from iccld.runtime.measure.flops import on_meta
from iccld.runtime.settings import Compile, EngineConfig
from iccld.stages.adversarial import AdversarialStage, new_discriminator
from iccld.stages.base import Stage
from iccld.stages.segmentation import SegmentationStage
from iccld.stages.settings import (
    AdversaryInput,
    DiffusionLoss,
    PseudoLabelSource,
    SegmentationConfig,
)
from iccld.uda.settings import CorruptionConfig
from tests.factory import layout_for, papers_objective, random_batch
from tests.models.factory import BACKBONES, tiny_model

VELOCITY = DiffusionLoss.velocity


def stage1(*, backbone: str = "segformer", latent: LatentKind = LatentKind.mask, **settings: Any) -> Stage:
    model = tiny_model(latent=latent, num_classes=19, backbone=backbone)
    return SegmentationStage(model, SegmentationConfig(masked_weight=1.0, **settings), seed=0)


def stage2(
    *,
    adversary_input: AdversaryInput = AdversaryInput.noise,
    latent: LatentKind = LatentKind.image,
    condition: ConditionKind = ConditionKind.latent,
    **settings: Any,
) -> Stage:
    model = tiny_model(latent=latent, num_classes=19, condition=condition)
    objective = papers_objective(adversary_input=adversary_input, **settings)
    discriminator = new_discriminator(model, objective, model.config.discriminator)
    return AdversarialStage(model, discriminator, objective, seed=0)


RECIPE: dict[str, Any] = {
    "flip_teacher": True,
    "class_thresholds": 0.95,
    "class_balance": 0.5,
    "corruption": CorruptionConfig(strength=1.0),
}
STAGES: dict[str, tuple[Callable[[], Stage], int]] = {
    **{f"stage 1, {backbone}": (lambda backbone=backbone: stage1(backbone=backbone), 6) for backbone in BACKBONES},
    "stage 1, image latent": (lambda: stage1(latent=LatentKind.image), 4),
    "stage 1, every option": (lambda: stage1(latent=LatentKind.image, **RECIPE), 10),
    **{f"stage 2, {each.name}": (lambda each=each: stage2(adversary_input=each), 6) for each in AdversaryInput},
    "stage 2, mask latent": (lambda: stage2(latent=LatentKind.mask), 6),
    "stage 2, task loss": (
        lambda: stage2(latent=LatentKind.mask, task_weight=1.0, pure_noise_share=0.5, diffusion_loss=VELOCITY),
        6,
    ),
    "stage 2, corruption": (lambda: stage2(corruption=CorruptionConfig(strength=1.0)), 11),
    "stage 2, rich, own labels": (
        lambda: stage2(condition=ConditionKind.rich, task_weight=1.0, pseudo_labels=PseudoLabelSource.denoiser),
        7,
    ),
    "stage 2, residual": (
        lambda: stage2(latent=LatentKind.residual, task_weight=1.0, pure_noise_share=0.5, flip_teacher=True),
        6,
    ),
    "stage 2, twin": (lambda: stage2(deterministic=True, task_weight=1.0), 2),
}
"""Stages by name, and how many tensors of draws a step may send to the device."""


def train_step(stage: Stage, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        inputs = stage.prepare(batch, 10)
    torch.stack(list(stage.module(inputs).losses.values())).sum().backward()
    stage.after_step(10)


class Copies(TorchDispatchMode):
    """Copies from the host, as (elements, whether the host goes on). Copies to it are refused by device meta itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.is_meta:
            self.seen.append((out.numel(), kwargs.get("non_blocking", False)))
        if func is torch.ops.aten.copy_.default and args[0].is_meta and not args[1].is_meta:
            self.seen.append((args[0].numel(), len(args) > 2 and args[2]))
        return out


class Literals(TorchFunctionMode):
    """Tensors made on the device out of the host's numbers: a copy that waits, and that no dispatch shows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        literal = getattr(func, "__name__", "") in ("tensor", "as_tensor", "asarray", "new_tensor")
        if literal and out.is_meta and not (isinstance(args[0], Tensor) and args[0].is_meta):
            self.seen.append(args)
        return out


@pytest.mark.parametrize("name", STAGES)
def test_a_step_reads_nothing_and_sends_only_draws_ahead(name: str) -> None:
    make, most = STAGES[name]
    stage = on_meta(make())
    batch = map_tensors(random_batch(num_classes=19, numbers=range(2)), lambda tensor: tensor.to("meta"))
    with Copies() as copies, Literals() as literals:
        train_step(stage, batch)
    assert not literals.seen
    waited = [elements for elements, goes_on in copies.seen if not goes_on]
    # Kornia sends the blur's sigmas, two a sample, ahead to CUDA devices alone.
    assert all(elements in (2 * 2, 2 * 6) for elements in waited) and len(waited) <= 4, copies.seen
    assert 0 < len(copies.seen) - len(waited) <= most, copies.seen


def test_a_waiting_copy_a_literal_and_a_read_are_found() -> None:
    with Copies() as copies, Literals() as literals:
        torch.ones(3).to("meta")
        torch.ones(2).to("meta", non_blocking=True)
        torch.empty(4, device="meta").copy_(torch.ones(4))
        torch.tensor(1.0, device="meta")
    assert copies.seen == [(3, False), (2, True), (4, False)] and len(literals.seen) == 1
    with pytest.raises(RuntimeError):
        torch.ones(1, device="meta").item()


@pytest.mark.gpu
@pytest.mark.parametrize("name", STAGES)
def test_a_step_does_not_wait_on_a_gpu(name: str) -> None:
    with Engine(EngineConfig(compile=Compile.none)) as engine:
        stage = STAGES[name][0]()
        for module in (stage.module, stage.assemble_models()["student"], stage.teacher.module):
            module.to(engine.device)
        engine.attach(stage.module, stage.param_groups(), layout=layout_for(engine, 1), gradient_clip=1.0)
        stage.start()
        for step in range(3):
            host = map_tensors(random_batch(num_classes=19, numbers=range(2)), Tensor.pin_memory)
            [batch] = engine.prefetch(iter([host]))
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step fills caches
            try:
                engine_step(engine, stage, batch, step)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def engine_step(engine: Engine, stage: Stage, batch: Any, step: int) -> None:
    with torch.no_grad(), engine.autocast():
        inputs = stage.prepare(batch, step)
    with engine.micro_batch(is_last=True):
        engine.backward(torch.stack(list(engine.module(inputs).losses.values())).sum())
    engine.step()
    stage.after_step(step)
