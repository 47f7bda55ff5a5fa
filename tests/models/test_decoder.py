"""The decoder and its inter-coder connection."""

import pytest
import torch

from iccld.models.blocks import FeatureFusion, group_norm, resample
from iccld.models.decoder import Decoder
from iccld.models.settings import DecoderConfig
from tests.models.factory import random_images, without_gradient

CHANNELS = (8, 16, 24, 32)


def make_decoder(**settings) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(width=16, num_blocks=1, **settings)
    return Decoder(config=config, latent_channels=4, feature_channels=CHANNELS, num_classes=5)


def random_features(*, batch: int = 2, height: int = 72, width: int = 88, seed: int = 0) -> list[torch.Tensor]:
    strides = zip(CHANNELS, (4, 8, 16, 32), strict=True)
    return [random_images(batch, c, -(-height // s), -(-width // s), seed=seed) for c, s in strides]


LATENT = random_images(2, 4, 9, 11, seed=5)


@pytest.mark.parametrize("inter_coder", [True, False])
def test_logits_have_stride_4_and_every_parameter_a_gradient(inter_coder: bool):
    decoder = make_decoder(inter_coder=inter_coder)
    logits = decoder(LATENT, random_features())
    assert logits.shape == (2, 5, 18, 22)
    logits.square().mean().backward()
    assert not without_gradient(decoder)


def test_without_the_connection_features_are_ignored():
    decoder = make_decoder(inter_coder=False)
    logits = decoder(LATENT, random_features())
    assert torch.equal(logits, decoder(LATENT, random_features(seed=1)))
    assert torch.equal(logits, decoder(LATENT, None))


def test_each_feature_is_heard_through_the_connection():
    decoder, features = make_decoder(), random_features()
    logits = decoder(LATENT, features)
    for i in range(4):
        changed = [x + (j == i) * torch.linspace(0, 3, x.shape[-1]) for j, x in enumerate(features)]
        assert not torch.allclose(logits, decoder(LATENT, changed), atol=1e-4), f"feature {i}"


def test_the_latent_is_heard_too():
    decoder, features = make_decoder(), random_features()
    assert not torch.allclose(decoder(LATENT, features), decoder(LATENT.flip(-1), features), atol=1e-4)


def test_the_connection_is_cut_per_sample():
    decoder, features = make_decoder(), random_features()
    cut, whole = decoder(LATENT, None), decoder(LATENT, features)
    mixed = decoder(LATENT, features, keep=torch.tensor([True, False]))
    torch.testing.assert_close(mixed[0], whole[0])
    torch.testing.assert_close(mixed[1], cut[1])
    assert not torch.allclose(whole[1], cut[1], atol=1e-4)


def test_bf16_autocast_runs():
    decoder = make_decoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = decoder(LATENT, random_features(), keep=torch.tensor([True, False]))
    logits.float().square().mean().backward()
    assert bool(torch.isfinite(logits).all()) and not without_gradient(decoder)


@pytest.mark.parametrize(("size", "stride"), [((9, 11), 8), ((18, 22), 4)])
def test_fusion_covers_the_size_asked_for(size: tuple[int, int], stride: int):
    fusion = FeatureFusion(feature_channels=CHANNELS, out_channels=16)
    assert fusion(random_features(), to_stride=stride, size=size).shape == (2, 16, *size)


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_resampling_keeps_places(stride: int):
    """A map that holds its own pixel coordinates still does at another stride, away from the border."""
    size = -(-72 // stride)
    centres = (torch.arange(size) + 0.5) * stride
    moved = resample(centres.expand(1, 1, size, size), stride=stride, to_stride=8, size=(9, 9))
    assert moved.shape == (1, 1, 9, 9)
    inside = slice(2, 5) if stride == 32 else slice(2, 7)
    torch.testing.assert_close(moved[0, 0, 0, inside], ((torch.arange(9) + 0.5) * 8)[inside])


@pytest.mark.parametrize("channels", [1, 3, 8, 9, 24, 64, 256, 320])
def test_group_norm_takes_any_width(channels: int):
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0 and norm.num_groups <= 32
    assert norm.num_groups == 1 or channels // norm.num_groups >= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 20}, r"model\.decoder\.width=20 must be a positive multiple of 8"),
        ({"width": 0}, r"model\.decoder\.width=0"),
        ({"num_blocks": 0}, r"model\.decoder\.num_blocks=0 must be at least 1"),
    ],
)
def test_config_values_are_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**settings)
