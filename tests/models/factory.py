"""Tiny models: every backbone family from a config of a few thousand parameters."""

import torch
from torch import Tensor, nn

from iccld.models.encoder import Encoder
from iccld.models.iccld import ICCLD
from iccld.models.model_card import ModelStage
from iccld.models.settings import (
    ConditionKind,
    DecoderConfig,
    DenoiserConfig,
    DiscriminatorConfig,
    EncoderConfig,
    LatentKind,
    ModelConfig,
)

PYRAMID = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "drop_path_rate": 0.3}
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "drop_path_rate": 0.3}
BACKBONES = {
    "segformer": {**PYRAMID, "num_attention_heads": [1, 1, 2, 4], "hidden_dropout_prob": 0.3},
    "convnextv2": PYRAMID,
    "swin": {
        "embed_dim": 8,
        "depths": [2, 2, 2, 2],
        "num_heads": [1, 2, 2, 4],
        "window_size": 4,
        "drop_path_rate": 0.3,
    },
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "dinov2": {**VIT, "image_size": 56, "patch_size": 14, "hidden_dropout_prob": 0.3},
    "dinov3_vit": {**VIT, "intermediate_size": 64, "patch_size": 16, "num_register_tokens": 2, "pos_embed_jitter": 1.5},
}


def encoder_config(model_type: str = "segformer") -> EncoderConfig:
    return EncoderConfig(backbone_config={"model_type": model_type, **BACKBONES[model_type]}, width=16)


def make_encoder(backbone: str = "segformer", *, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(config=encoder_config(backbone), latent_channels=4)


def model_config(
    *,
    latent: LatentKind = LatentKind.image,
    condition: ConditionKind = ConditionKind.latent,
    backbone: str = "segformer",
) -> ModelConfig:
    return ModelConfig(
        encoder=encoder_config(backbone),
        decoder=DecoderConfig(width=16, num_blocks=1),
        denoiser=DenoiserConfig(width=16, channel_multipliers=[1, 2], num_blocks=1, attention_levels=[1], head_dim=16),
        discriminator=DiscriminatorConfig(width=8),
        latent=latent,
        latent_channels=4,
        condition=condition,
    )


def tiny_model(*, seed: int = 0, num_classes: int = 5, **options) -> ICCLD:
    torch.manual_seed(seed)
    return ICCLD(config=model_config(**options), num_classes=num_classes)


def trained_model(**options) -> ICCLD:
    """A model in eval mode that takes its denoiser for trained, with latent statistics of its own."""
    model = tiny_model(**options).eval()
    model.stage = ModelStage.adversarial
    model.latent_mean.uniform_(-1, 1)
    model.condition_std.uniform_(0.5, 2)
    return model


def random_noise(model: ICCLD, images: Tensor) -> Tensor:
    shape = (len(images), *model.latent_shape(*images.shape[-2:]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def without_gradient(module: nn.Module) -> list[str]:
    """Names of the trainable parameters that a backward pass left without a finite gradient."""
    return [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not bool(torch.isfinite(p.grad).all()))
    ]


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
