"""Called on two ranks of any engine, in part on one; asserts what must hold of gradients and weights after a step."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from iccld.runtime.engine.engine import Engine
from iccld.runtime.settings import EngineConfig, Precision
from iccld.runtime.tensors import local_tensor
from iccld.stages.base import Stage, StageInputs
from iccld.uda.teacher import Teacher
from tests.factory import layout_for, random_batch
from tests.stages.test_adversarial import make_stage


def micro_batch(stage: Stage, number: int) -> StageInputs:
    with torch.no_grad():
        return stage.prepare(random_batch(num_classes=19, numbers=[number]), 0)


def mean_gradients(numbers: Iterable[int]) -> dict[str, Tensor]:
    """The mean over micro-batches of one sample each, without any engine."""
    stage, numbers = make_stage(), list(numbers)
    for number in numbers:
        losses = stage.module(micro_batch(stage, number)).losses
        (torch.stack(list(losses.values())).sum() / len(numbers)).backward()
    return {name: p.grad.clone() for name, p in stage.module.named_parameters() if p.grad is not None}


def train_step(engine: Engine, stage: Stage, num_accumulation: int, *, first: int) -> None:
    for i in range(num_accumulation):
        inputs = micro_batch(stage, first + num_accumulation * engine.ranks.rank + i)
        with engine.micro_batch(is_last=i + 1 == num_accumulation):
            losses = engine.module(inputs).losses
            engine.backward(torch.stack(list(losses.values())).sum())
    engine.step(with_norm=True)


def whole_tensors(engine: Engine, prefix: str) -> dict[str, Tensor]:
    """Join what each rank would write into a checkpoint."""
    whole: dict[str, Tensor] = {}
    for held in engine.ranks.gather({n: run for n, run in engine.runs({}).items() if n.startswith(prefix)}):
        for name, (shape, start, data) in held.items():
            flat = whole.setdefault(name.removeprefix(prefix), torch.full(shape, torch.nan)).view(-1)
            flat[start : start + len(data)] = data
    return whole


def check_gradients(engine: Engine, num_accumulation: int) -> None:
    """After one step from zero AdamW's first moment is (1 - beta_1) times the gradient: that of all micro-batches.

    A second step must not see the first one's gradients again.
    """
    stage = make_stage()
    layout = layout_for(engine, num_accumulation)
    engine.attach(stage.module, stage.param_groups(), layout=layout, replicated=stage.replicated())
    engine.set_learning_rate(0.0)  # so that a second step's gradients are comparable too
    count = num_accumulation * engine.ranks.world_size
    expected = [mean_gradients(range(first, first + count)) for first in (0, 100)]
    for step, first in enumerate((0, 100)):
        train_step(engine, stage, num_accumulation, first=first)
        norm = torch.cat([gradient.flatten() for gradient in expected[step].values()]).norm()
        torch.testing.assert_close(engine.backend.gradient_norm, norm, rtol=1e-4, atol=0, msg="without clipping")
        moments = whole_tensors(engine, "exp_avg/")
        assert moments.keys() == expected[0].keys()
        for name, moment in moments.items():
            old = 0.1 * expected[0][name]
            wanted = old if step == 0 else 0.9 * old + 0.1 * expected[1][name]
            torch.testing.assert_close(moment, wanted, rtol=1e-4, atol=1e-7, msg=f"{name} in step {step}")


def check_clipping(engine: Engine) -> None:
    """The gradient of all micro-batches and ranks is cut to the norm, sharded or not."""
    stage, clip = make_stage(), 0.05
    engine.attach(
        stage.module,
        stage.param_groups(),
        layout=layout_for(engine, 2),
        gradient_clip=clip,
        replicated=stage.replicated(),
    )
    train_step(engine, stage, 2, first=0)
    expected = mean_gradients(range(2 * engine.ranks.world_size))
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert norm > 2 * clip, norm
    check_facts(engine, norm)
    for name, moment in whole_tensors(engine, "exp_avg/").items():
        wanted = 0.1 * expected[name] * clip / norm
        torch.testing.assert_close(moment, wanted, rtol=1e-3, atol=1e-7, msg=name)


def check_facts(engine: Engine, norm: Tensor) -> None:
    """The norm is of the gradients as they were, on each rank, and the groups share a rate."""
    facts = engine.facts_of_step()
    torch.testing.assert_close(facts.pop("gradient_norm"), norm, rtol=1e-4, atol=0)
    assert facts == {"learning_rate": 1e-4}, facts


def check_equal_weights(engine: Engine) -> None:
    """After steps on different data every rank holds the same weights."""
    stage = make_stage()
    before = {name: p.detach().clone() for name, p in stage.module.named_parameters()}
    engine.attach(stage.module, stage.param_groups(), layout=layout_for(engine, 2), replicated=stage.replicated())
    for first in (0, 50):
        train_step(engine, stage, 2, first=first)
    mine = engine.backend.full({name: p.detach() for name, p in stage.module.named_parameters()})
    for theirs in engine.ranks.gather(mine):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(mine[name], before[name]) for name in mine)


def check_finite(engine: Engine) -> None:
    """A weight of the last rank alone that is not finite is known on all ranks."""
    stage = make_stage()
    engine.attach(stage.module, stage.param_groups(), layout=layout_for(engine, 1), replicated=stage.replicated())
    assert engine.has_finite_weights()
    if engine.ranks.rank == engine.ranks.world_size - 1:
        with torch.no_grad():
            next(own for p in engine.backend.parameters().values() if (own := local_tensor(p)).numel()).fill_(torch.nan)
    assert not engine.has_finite_weights()


def check_from_main(engine: Engine) -> None:
    """All ranks get rank 0's value, whatever theirs is, and however large it is."""
    value = {"of": engine.ranks.rank, "large": "x" * (100_000 * (1 + engine.ranks.rank))}
    assert engine.ranks.from_main(value) == {"of": 0, "large": "x" * 100_000}


def check_teacher(engine: Engine) -> None:
    """The teacher, sharded or not, equals to the bit one that averages the whole weights."""
    stage = make_stage()
    copy = make_stage().module.denoiser
    expected = Teacher(copy, max_decay=stage.config.teacher_decay)
    engine.attach(stage.module, stage.param_groups(), layout=layout_for(engine, 1), replicated=stage.replicated())
    for average, methods in stage.averages().items():
        engine.backend.shard(average, methods=methods)
    for step in range(3):
        train_step(engine, stage, 1, first=10 * step)
        stage.after_step(step)
        copy.load_state_dict(engine.backend.full(stage.student.state_dict()))
        expected.update(copy, step)
    assert engine.is_sharded == any(isinstance(p, DTensor) for p in stage.teacher.module.parameters())
    for name, tensor in engine.backend.full(stage.teacher.state_dict()).items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def check_bf16(engine: Engine) -> None:
    """Gradients are those of fp32 to bf16's precision; weights, moments and teacher stay fp32."""
    stage = make_stage()
    engine.attach(stage.module, stage.param_groups(), layout=layout_for(engine, 1), replicated=stage.replicated())
    with engine.autocast():
        train_step(engine, stage, 1, first=0)
    expected = mean_gradients(range(engine.ranks.world_size))
    moments = whole_tensors(engine, "exp_avg/")
    cosine = torch.cosine_similarity(
        torch.cat([0.1 * expected[name].flatten() for name in moments]),
        torch.cat([moment.flatten() for moment in moments.values()]),
        dim=0,
    )
    exact = all(torch.equal(moments[name], 0.1 * expected[name]) for name in moments)
    assert cosine > 0.99 and not exact, cosine
    held = [*engine.runs({}).values()]
    assert all(run.data.dtype is torch.float32 for run in held if run.data.is_floating_point())


def main(done: str, kind: str) -> None:
    for num_accumulation in (1, 4):
        with Engine(EngineConfig()) as engine:
            assert (engine.ranks.world_size, engine.kind.value) == (2, kind)
            check_gradients(engine, num_accumulation)
    with Engine(EngineConfig()) as engine:
        check_equal_weights(engine)
        check_clipping(engine)
        check_teacher(engine)
        check_from_main(engine)
        check_finite(engine)
    with Engine(EngineConfig(precision=Precision.bf16)) as engine:
        check_bf16(engine)
    if kind == "fsdp2":
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "false"
        with Engine(EngineConfig()) as engine:
            check_teacher(engine)
    Path(done, f"gradients_{engine.ranks.rank}").touch()
