"""The encoder over every backbone family: shapes, alignment, gradients, no randomness."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from iccld.models import encoder as encoder_module
from iccld.models.decoder import Decoder
from iccld.models.encoder import Encoder
from iccld.models.settings import DecoderConfig
from tests.models.factory import BACKBONES, encoder_config, make_encoder, random_images, without_gradient

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


@every_backbone
@pytest.mark.parametrize(("height", "width"), [(64, 96), (72, 88), (8, 16), (50, 45)])
def test_strides_and_channels(backbone: str, height: int, width: int):
    encoder = make_encoder(backbone)
    latent, features = encoder(random_images(2, 3, height, width))
    height, width = -(-height // 8) * 8, -(-width // 8) * 8
    assert latent.shape == (2, 4, height // 8, width // 8) and latent.dtype == torch.float32
    for x, stride, channels in zip(features, (4, 8, 16, 32), encoder.feature_channels, strict=True):
        assert x.shape == (2, channels, -(-height // stride), -(-width // stride))


@every_backbone
def test_one_backward_of_the_decoders_output_reaches_every_trainable_parameter(backbone: str):
    encoder = make_encoder(backbone)
    for inter_coder in (True, False):
        decoder = Decoder(
            config=DecoderConfig(width=16, num_blocks=1, inter_coder=inter_coder),
            latent_channels=4,
            feature_channels=encoder.feature_channels,
            num_classes=5,
        )
        encoder.zero_grad()
        encoded = encoder(random_images(2, 3, 64, 64))
        decoder(encoded.latent, encoded.features).square().mean().backward()
        assert not without_gradient(encoder) and not without_gradient(decoder)


@every_backbone
def test_a_second_encoder_of_a_config_is_as_the_first_whatever_was_built_before(
    backbone: str, monkeypatch: pytest.MonkeyPatch
):
    """A process passes images through one backbone of each config; in inference mode a pass would tell nothing."""
    monkeypatch.setattr(encoder_module, "_TAPS", {})
    with torch.inference_mode():
        make_encoder(backbone)
    with torch.device("meta"):
        make_encoder(backbone)
    second = make_encoder(backbone)
    monkeypatch.setattr(encoder_module, "_TAPS", {})
    first = make_encoder(backbone)
    assert (second.taps, second.feature_channels) == (first.taps, first.feature_channels)
    trained = [[name for name, p in encoder.named_parameters() if p.requires_grad] for encoder in (first, second)]
    assert trained[0] == trained[1] and len(trained[0]) > 4
    hooks = [[len(module._forward_hooks) for module in encoder.modules()] for encoder in (first, second)]
    assert hooks[0] == hooks[1]
    images = random_images(1, 3, 64, 96)
    assert torch.equal(first(images).latent, second(images).latent)


@pytest.mark.parametrize(
    ("backbone", "part"),
    [
        ("mobilenet_v2", "conv_1x1.convolution.weight"),
        ("dinov2", "embeddings.mask_token"),
        ("dinov3_vit", "embeddings.mask_token"),
        ("convnextv2", "layernorm.weight"),
        ("swin", "layernorm.weight"),
    ],
)
def test_what_no_feature_depends_on_does_not_train(backbone: str, part: str):
    encoder = make_encoder(backbone)
    assert not encoder.backbone.get_parameter(part).requires_grad
    assert sum(p.requires_grad for p in encoder.backbone.parameters()) > 4


@every_backbone
def test_training_draws_nothing_and_samples_do_not_mix(backbone: str):
    encoder, images = make_encoder(backbone), random_images(3, 3, 64, 64)
    state = torch.get_rng_state()
    trained = encoder.train()(images)
    assert torch.equal(torch.get_rng_state(), state)
    evaluated = encoder.eval()(images)
    assert torch.equal(trained.latent, evaluated.latent)
    alone = encoder(images[1:2]).latent
    torch.testing.assert_close(alone, evaluated.latent[1:2], rtol=1e-4, atol=1e-4)


@every_backbone
def test_an_output_does_not_depend_on_the_sizes_seen_before(backbone: str):
    encoder, images = make_encoder(backbone).eval(), random_images(1, 3, 128, 128)
    before = encoder(images).latent
    encoder(random_images(1, 3, 32, 32))
    assert torch.equal(encoder(images).latent, before)


def test_batch_norm_of_a_backbone_never_moves():
    encoder = make_encoder("mobilenet_v2").train()
    norms = [m for m in encoder.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {float(buffer) for norm in norms for name, buffer in norm.named_buffers() if "num" in name} == {0.0}
    before = [buffer.clone() for norm in norms for buffer in norm.buffers()]
    encoder(random_images(2, 3, 64, 64)).latent.sum().backward()
    after = [buffer for norm in norms for buffer in norm.buffers()]
    assert norms and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(norm.training or p.requires_grad for norm in norms for p in norm.parameters())
    assert encoder.training


@every_backbone
def test_features_lie_where_the_image_has_them(backbone: str):
    """A bright square moves the features most at its own place, at every stride and where sizes are rounded up."""
    encoder = make_encoder(backbone).eval()
    for module in encoder.backbone.modules() if backbone == "mobilenet_v2" else ():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # its own fades to 0 without weights that fit its BatchNorm
    depth = 2 if backbone == "mobilenet_v2" else 4  # deeper, random ones of its kind spread a change everywhere
    plain = torch.full((1, 3, 104, 136), 0.4)
    marked = plain.clone()
    marked[..., 64:96, 96:128] = 1.0  # a whole cell of stride 32
    with torch.no_grad():
        changes = [
            (a - b).abs().sum(dim=1)[0] for a, b in zip(encoder(plain).features, encoder(marked).features, strict=True)
        ]
    for change, stride in zip(changes[:depth], (4, 8, 16, 32)[:depth], strict=True):
        weight = change.square() / change.square().sum()
        row = float((weight.sum(dim=1) * (torch.arange(len(change)) + 0.5)).sum()) * stride
        column = float((weight.sum(dim=0) * (torch.arange(change.shape[1]) + 0.5)).sum()) * stride
        assert abs(row - 80) < 20 and abs(column - 112) < 20, (stride, row, column)


def test_images_are_normalised_by_the_config():
    config = encoder_config()
    config.image_mean, config.image_std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    torch.manual_seed(0)
    encoder = Encoder(config=config, latent_channels=4)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = random_images(1, 3, 32, 32)
    encoder(images)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.image_mean, config.image_std))
    torch.testing.assert_close(seen[-1], (images - mean) / std)


def test_initial_weights_are_a_function_of_the_seed():
    first, second, other = (make_encoder(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_bf16_autocast_runs():
    encoder = make_encoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent = encoder(random_images(1, 3, 32, 32)).latent
    latent.float().sum().backward()
    assert bool(torch.isfinite(latent).all()) and not without_gradient(encoder)


@every_backbone
def test_activation_checkpointing_keeps_less_and_changes_no_output_and_no_gradient(backbone: str):
    config, images = encoder_config(backbone), random_images(2, 3, 64, 64)
    if backbone in ("convnextv2", "mobilenet_v2"):
        with pytest.raises(ValueError, match=rf"encoder\.activation_checkpointing=true: .*'{backbone}' cannot"):
            Encoder(config=replace(config, activation_checkpointing=True), latent_channels=4)
        return
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(config=replace(config, activation_checkpointing=recomputed), latent_channels=4)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            latent, features = encoder(images)
        torch.stack([x.square().mean() for x in (latent, *features)]).sum().backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
        found.append((sum(kept), latent, features, gradients))
    plain, saving = found
    assert saving[0] < 0.8 * plain[0]
    torch.testing.assert_close(saving[1:], plain[1:], rtol=0, atol=0)
