"""Backbones from a folder or a config: what is loaded, what is reported, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from iccld.models.encoder import Encoder
from iccld.models.settings import EncoderConfig
from tests.models.factory import BACKBONES, make_encoder, random_images

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


@every_backbone
def test_a_folder_gives_its_weights(backbone: str, tmp_path: Path):
    first = make_encoder(backbone)
    first.backbone.save_pretrained(tmp_path)
    torch.manual_seed(1)
    second = Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
    assert second.backbone.dtype == torch.float32
    for name, tensor in first.backbone.state_dict().items():
        assert torch.equal(tensor, second.backbone.state_dict()[name]), name
    images = random_images(1, 3, 64, 64)
    for a, b in zip(first(images).features, second(images).features, strict=True):
        assert torch.equal(a, b)


SMALL_CVT = {
    "model_type": "cvt", "embed_dim": [8, 16, 24], "num_heads": [1, 1, 1], "depth": [1, 2, 3],
    "drop_path_rate": [0.5, 0.5, 0.5], "drop_rate": [0.5, 0.5, 0.5],
}  # fmt: skip
SMALL_LEVIT = {
    "model_type": "levit", "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1],
    "key_dim": [16, 16, 16], "image_size": 64, "drop_path_rate": 0,
}  # fmt: skip
GLPN = {"model_type": "glpn", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1] * 4}


def test_tokens_without_maps_are_refused(tmp_path: Path):
    values = {key: value for key, value in SMALL_LEVIT.items() if key != "model_type"}
    AutoModel.from_config(AutoConfig.for_model("levit", **values)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokens of a 'levit' are no maps"):
        Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)


def test_a_further_type_can_be_chosen_and_draws_nothing(tmp_path: Path):
    first = Encoder(config=EncoderConfig(backbone_config=SMALL_CVT, width=16), latent_channels=4)
    first.backbone.save_pretrained(tmp_path)
    second = Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
    before = torch.get_rng_state()
    images = torch.full((1, 3, 64, 64), 0.5)
    for a, b in zip(first(images).features, second(images).features, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_type_that_no_card_may_have_can_be_chosen_by_who_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(ValueError, match="gives no feature maps"):
        Encoder(config=EncoderConfig(backbone_config=GLPN), latent_channels=4)
    values = {key: value for key, value in GLPN.items() if key != "model_type"}
    AutoModel.from_config(AutoConfig.for_model("glpn", **values)).save_pretrained(tmp_path)
    encoder = Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
    assert encoder.feature_channels == (8, 16, 24, 32)
    assert "with a glpn backbone cannot be loaded again" in caplog.text


def test_half_precision_weights_become_float32(tmp_path: Path):
    make_encoder("mobilenet_v2").backbone.half().save_pretrained(tmp_path)
    encoder = Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["/nowhere/backbone", "no-owner/no-backbone"])
def test_a_missing_backbone_is_named_with_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=rf"model\.encoder\.pretrained='{name}' cannot be loaded(.|\n)*folder with its"
    ):
        Encoder(config=EncoderConfig(pretrained=name), latent_channels=4)


def test_an_empty_folder_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.encoder\.pretrained=.*cannot be loaded"):
        Encoder(config=EncoderConfig(pretrained=str(tmp_path)), latent_channels=4)


def test_weights_that_the_folder_lacks_are_an_error(tmp_path: Path):
    make_encoder().backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(iter(sorted(weights)))
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.encoder\.pretrained=.* lacks 1 of the backbone's weights"):
        Encoder(config=EncoderConfig(pretrained=str(tmp_path)), latent_channels=4)


def test_missing_weights_that_nothing_uses_are_no_error(tmp_path: Path):
    make_encoder("mobilenet_v2").backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "conv_1x1.convolution" not in k}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)


def test_missing_batch_norm_statistics_are_an_error(tmp_path: Path):
    make_encoder("mobilenet_v2").backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if k != "conv_stem.first_conv.normalization.running_mean"}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="running_mean"):
        Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)


def test_unexpected_weights_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_encoder().backbone.save_pretrained(tmp_path)
    weights = {**load_file(tmp_path / "model.safetensors"), "stray.weight": torch.zeros(1)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    Encoder(config=EncoderConfig(pretrained=str(tmp_path), width=16), latent_channels=4)
    assert "left out weights of ['stray.weight']" in caplog.text


def test_a_config_of_other_sizes_than_its_weights_is_named(tmp_path: Path):
    make_encoder().backbone.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_sizes": [8, 16, 24, 64]}))
    with pytest.raises(ValueError, match=r"model\.encoder\.pretrained=.*cannot be loaded"):
        Encoder(config=EncoderConfig(pretrained=str(tmp_path)), latent_channels=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EncoderConfig(), "set exactly one"),
        (EncoderConfig(pretrained="x", backbone_config={"model_type": "segformer"}), "set exactly one"),
        (EncoderConfig(backbone_config={"depths": [1]}), "needs a model_type: one of segformer"),
        (EncoderConfig(backbone_config={"model_type": "nonsense"}), "is no transformers config"),
        (
            EncoderConfig(
                backbone_config={
                    "model_type": "resnet",
                    "hidden_sizes": [8, 8, 8, 8],
                    "embedding_size": 8,
                    "depths": [1, 1, 1, 1],
                }
            ),
            None,
        ),
        (EncoderConfig(backbone_config={"model_type": "bert", "hidden_size": 12}), "gives no feature maps; use one of"),
    ],
)
def test_backbone_settings_are_checked(config: EncoderConfig, message: str | None):
    if message is None:
        assert len(Encoder(config=config, latent_channels=4).feature_channels) == 4
        return
    with pytest.raises(ValueError, match=message):
        Encoder(config=config, latent_channels=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": [0.5]}, r"model\.encoder\.image_mean=\[0\.5\] must be three"),
        ({"image_std": [0.5, 0.5, 0.0]}, r"model\.encoder\.image_std=.*above 0"),
        ({"width": 12}, r"model\.encoder\.width=12 must be a positive multiple of 8"),
    ],
)
def test_config_values_are_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**settings)
