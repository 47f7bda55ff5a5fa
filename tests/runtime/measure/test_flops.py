"""FLOPs from shapes equal those that torch's counter finds while the real thing runs, part by part and step by step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop

from iccld.models.blocks import SelfAttention
from iccld.models.denoiser import Denoiser
from iccld.models.discriminator import Discriminator
from iccld.models.encoder import Encoder
from iccld.models.settings import AttentionBackend, ConditionKind, DenoiserConfig, DiscriminatorConfig, LatentKind
from iccld.runtime.measure.flops import FlopCounter, StepFlops, count_step, on_meta
from iccld.stages.adversarial import AdversarialStage, new_discriminator
from iccld.stages.base import Stage
from iccld.stages.segmentation import SegmentationStage
from iccld.stages.settings import AdversaryInput, PseudoLabelSource, SegmentationConfig
from iccld.uda.settings import CorruptionConfig
from tests.factory import papers_objective, random_batch
from tests.models.factory import BACKBONES, make_encoder, random_images, tiny_model


def grouped_backward(*args: Any, out_shape: Any, **options: Any) -> int:
    """torch counts the gradient of a grouped convolution's weight as that of a whole one: `groups` times too much."""
    *rest, (with_input, with_weight, with_bias) = args
    of_input = conv_backward_flop(*rest, (with_input, False, with_bias), out_val=out_shape, **options)
    of_weight = conv_backward_flop(*rest, (False, with_weight, with_bias), out_val=out_shape, **options)
    return of_input + of_weight // rest[-1]


def torch_count(run: Callable[[], Any]) -> tuple[Any, int]:
    """Return what `run` returns, and the FLOPs that torch counts in it, with attention of parts that it can count."""
    mapping = {torch.ops.aten.convolution_backward: grouped_backward}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        out = run()
    return out, counter.get_total_flops()


def tensors_of(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for item in output for tensor in tensors_of(item)]


def assert_counts_alike(module: nn.Module, *inputs: Any) -> None:
    """Forward and backward, on meta against the real module on the CPU, to the last FLOP."""
    output, forward = torch_count(lambda: module(*inputs))
    loss = torch.stack([tensor.float().sum() for tensor in tensors_of(output)]).sum()
    _, backward = torch_count(loss.backward)
    twin = on_meta(module)
    with FlopCounter({"it": twin}) as counter:
        losses = tensors_of(twin(*(on_meta(value) for value in inputs)))
    assert forward > 0 and backward > 0
    assert counter.forward == {"it": forward}
    assert counter.backward(losses) == {"it": backward}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_encoders(backbone: str) -> None:
    assert_counts_alike(make_encoder(backbone), random_images(2, 3, 60, 100))


@pytest.mark.parametrize("inter_coder", [True, False])
def test_decoder(inter_coder: bool) -> None:
    model = tiny_model()
    model.config.decoder.inter_coder = inter_coder
    decoder = type(model.decoder)(
        config=model.config.decoder,
        latent_channels=4,
        feature_channels=model.encoder.feature_channels,
        num_classes=5,
    )
    with torch.no_grad():
        encoded = model.encoder(random_images(2, 3, 64, 96))
    assert_counts_alike(decoder, encoded.latent, encoded.features)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_denoiser_counts_no_recomputation(checkpointing: bool) -> None:
    config = DenoiserConfig(width=16, channel_multipliers=[1, 2], num_blocks=1, attention_levels=[0, 1], head_dim=8)
    torch.manual_seed(0)
    denoiser = Denoiser(config=config, latent_channels=4, condition_channels=4)
    inputs = (torch.randn(2, 4, 9, 12), torch.tensor([1, 900]), torch.randn(2, 4, 9, 12))
    if not checkpointing:
        assert_counts_alike(denoiser, *inputs)
    counts = []
    for config.activation_checkpointing in (False, True):
        twin = on_meta(denoiser)
        with FlopCounter({"it": twin}) as counter:
            output = twin(*on_meta(inputs))
        counts.append((counter.forward, counter.backward([output.noise_pred])))
    assert counts[0] == counts[1]


def test_discriminator() -> None:
    discriminator = Discriminator(config=DiscriminatorConfig(width=8), in_channels=4, num_domains=3)
    assert_counts_alike(discriminator, torch.randn(2, 4, 9, 12), torch.tensor([1, 900]))


class Mixture(nn.Module):
    """Products of every spelling, with and without a gradient of each operand."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.one = nn.Conv1d(6, 4, 3, groups=2, padding=1)
        self.three = nn.Conv3d(1, 2, 3, stride=2)
        self.up = nn.ConvTranspose2d(1, 4, 3, stride=2, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w + torch.matmul(self.w, x) + x.matmul(x) + torch.bmm(x, x)
        y = y + torch.baddbmm(y, x, self.w.expand(len(x), 6, 6)) + F.linear(y, self.w)
        y = y + torch.addmm(y[0], self.w, x[0]) + torch.mm(self.w, self.w) + y @ x.transpose(1, 2)
        volume = self.three(y.unsqueeze(1).expand(-1, 6, -1, -1).unsqueeze(1))
        return self.one(y).sum() + volume.sum() + self.up(input=y.unsqueeze(1)).sum()


def test_products_and_convolutions_of_every_kind() -> None:
    assert_counts_alike(Mixture(), torch.randn(3, 6, 6))


def test_attention_of_another_length_and_width() -> None:
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
    v.requires_grad_()
    _, expected = torch_count(lambda: F.scaled_dot_product_attention(q, k, v))
    with FlopCounter({}) as counter:
        out = F.scaled_dot_product_attention(*(x.to("meta") for x in (q, k)), value=v.to("meta"))
    assert counter.forward == {"other": expected}
    assert counter.backward([out]) == {"other": 2 * expected}  # the scores' gradient needs all three


def test_attention_costs_the_same_whatever_back_end() -> None:
    attention = on_meta(SelfAttention(16, head_dim=8, backend=AttentionBackend.sdpa))
    counts = []
    for attention.backend in AttentionBackend:
        with FlopCounter({"it": attention}) as counter:
            out = attention(torch.empty(2, 16, 4, 4, device="meta"))
        counts.append((counter.forward, counter.backward([out])))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("product", [lambda x: torch.einsum("ij,jk", x, x), lambda x: torch.tensordot(x, x, 1)])
def test_a_product_without_a_rule_is_refused(product: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="has no rule; call matmul, or add a rule"), FlopCounter({}):
        product(torch.ones(2, 2))


def test_a_failing_part_ends() -> None:
    part = nn.Linear(2, 2)
    with FlopCounter({"part": part}) as counter:
        with pytest.raises(RuntimeError):
            part(torch.ones(3))
        F.linear(torch.ones(1, 2), torch.ones(1, 2))
    assert counter.forward == {"other": 4}
    assert not part._forward_hooks and not part._forward_pre_hooks


def stage1(latent: LatentKind = LatentKind.image, **settings: Any) -> SegmentationStage:
    model = tiny_model(latent=latent, num_classes=19)
    model.config.encoder.pretrained = "a published one"  # the feature distance asks for it
    return SegmentationStage(model, SegmentationConfig(**settings), seed=0, reference=reference_of(settings))


def reference_of(settings: dict[str, Any]) -> Encoder | None:
    return make_encoder().requires_grad_(False) if settings.get("feature_distance_weight") else None


def stage2(
    latent: LatentKind = LatentKind.image,
    *,
    seen: AdversaryInput = AdversaryInput.noise,
    condition: ConditionKind = ConditionKind.latent,
    **settings: Any,
) -> AdversarialStage:
    model = tiny_model(latent=latent, num_classes=19, condition=condition)
    objective = papers_objective(adversary_input=seen, **settings)
    discriminator = new_discriminator(model, objective, model.config.discriminator)
    return AdversarialStage(model, discriminator, objective, seed=0)


def batch_of(count: int) -> dict[str, Any]:
    return random_batch(num_classes=19, numbers=range(count))


STAGES = {
    "stage 1": stage1,
    "source only": lambda: stage1(adapt=False),
    "masked, feature distance": lambda: stage1(masked_weight=1.0, feature_distance_weight=0.005),
    "own pseudo-labels": lambda: stage1(use_teacher=False),
    "flip average, class-wise weights": lambda: stage1(flip_teacher=True, class_thresholds=0.95, class_balance=0.5),
    "corruption": lambda: stage1(corruption=CorruptionConfig(strength=0.5)),
    "stage 1, mask latent": lambda: stage1(LatentKind.mask, masked_weight=1.0),
    "stage 2": stage2,
    "stage 2, z_0": lambda: stage2(seen=AdversaryInput.z0),
    "stage 2, features": lambda: stage2(seen=AdversaryInput.features),
    "stage 2, mask latent": lambda: stage2(LatentKind.mask),
    "stage 2, task loss": lambda: stage2(task_weight=1.0),
    "stage 2, residual": lambda: stage2(LatentKind.residual, pure_noise_share=0.5, task_weight=1.0),
    "stage 2, map": lambda: stage2(seen=AdversaryInput.map),
    "stage 2, own labels": lambda: stage2(
        task_weight=1.0, pseudo_labels=PseudoLabelSource.denoiser, flip_teacher=True, corruption=CorruptionConfig(0.5)
    ),
    "stage 2, rich": lambda: stage2(condition=ConditionKind.rich),
    "stage 2, twin": lambda: stage2(deterministic=True, task_weight=1.0),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_whole_step(name: str) -> None:
    stage: Stage = STAGES[name]()
    counted = count_step(stage, batch_of(2), 0)
    with torch.no_grad():
        inputs, prepare = torch_count(lambda: stage.prepare(batch_of(2), 0))
    output, forward = torch_count(lambda: stage.module(inputs))
    _, backward = torch_count(torch.stack(list(output.losses.values())).sum().backward)
    assert [sum(by_part.values()) for by_part in counted] == [prepare, forward, backward]
    assert counted.total == prepare + forward + backward


def test_a_step_is_counted_by_part_and_in_proportion_to_its_samples() -> None:
    stage = stage1(LatentKind.mask, masked_weight=1.0, feature_distance_weight=0.005)
    one, two = (count_step(stage, batch_of(count), 0) for count in (1, 2))
    for few, many in zip(one, two, strict=True):
        assert many == {part: 2 * flops for part, flops in few.items()}
    assert one.prepare.keys() == {"teacher encoder", "teacher decoder", "reference", "other"}
    assert one.forward.keys() == one.backward.keys() == {"encoder", "decoder", "mask_encoder"}
    assert one.forward["encoder"] == 3 * one.prepare["teacher encoder"] == 3 * one.prepare["reference"]
    assert one.forward["decoder"] == 4 * one.prepare["teacher decoder"]  # and of the mask's latent
    second = count_step(stage2(LatentKind.mask), batch_of(1), 0)
    assert second.prepare.keys() == {"encoder", "decoder", "mask_encoder"}
    assert second.forward.keys() == second.backward.keys() == {"denoiser", "discriminator"}


def test_the_flip_average_doubles_the_teachers_work() -> None:
    once, twice = (count_step(stage1(flip_teacher=flip), batch_of(1), 0) for flip in (False, True))
    for part in ("teacher encoder", "teacher decoder"):
        assert twice.prepare[part] == 2 * once.prepare[part]
    assert (twice.forward, twice.backward) == (once.forward, once.backward)


def test_counting_leaves_the_stage_as_it_is() -> None:
    stage, batch = stage1(), batch_of(1)
    before = {name: tensor.clone() for name, tensor in stage.module.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in stage.module.modules()]
    assert isinstance(count_step(stage, batch, 0), StepFlops)
    for name, tensor in stage.module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [len(module._forward_hooks) for module in stage.module.modules()] == hooks
    twin = on_meta(stage)
    tensors = [*twin.module.parameters(), *twin.module.buffers(), *twin.state_dict().values()]
    assert all(tensor.is_meta for tensor in tensors)
    trains = [p.requires_grad for p in stage.module.parameters()]
    assert [p.requires_grad for p in twin.module.parameters()] == trains
