"""The settings of the model: each box of the figure, and what is diffused. Nothing here needs torch."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from iccld.ranges import above, at_least, check_ranges


@dataclass
class EncoderConfig:
    """Settings of E: a published backbone, or one that is built without weights."""

    pretrained: str = ""  # hub id or folder of a published backbone
    backbone_config: dict[str, Any] = field(default_factory=dict)
    """A transformers config with its `model_type`, for a backbone without weights."""
    image_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of RGB in [0, 1]; belongs to the backbone (ImageNet's here)."""
    image_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of RGB in [0, 1]; MobileNetV2 wants 0.5 for both."""
    width: int = 256  # channels of the latent head
    activation_checkpointing: bool = field(default=False, metadata={"of_training": True})
    """Recompute the backbone's layers in the backward pass."""

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or (name == "image_std" and min(values) <= 0):
                raise ValueError(f"model.encoder.{name}={values} must be three numbers (R, G, B), the std above 0.")
        if self.width < 8 or self.width % 8:
            raise ValueError(
                f"model.encoder.width={self.width} must be a positive multiple of 8 (four features share it)."
            )


@dataclass
class DecoderConfig:
    """Settings of D, which has a level at stride 8 and one at stride 4."""

    width: int = 256  # channels at stride 8; half as many at stride 4
    inter_coder: bool = True  # the connection to the encoder's features
    num_blocks: int = 2  # residual blocks at each of the two strides

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise ValueError(
                f"model.decoder.width={self.width} must be a positive multiple of 8 (four features share half of it)."
            )
        check_ranges(self, "model.decoder", num_blocks=at_least(1))


class AttentionBackend(Enum):
    """Implementations of softmax(q k^T / sqrt(D)) v: torch's, or xformers' memory-efficient kernels (CUDA only).

    Members have the names that a config file uses.
    """

    sdpa = "sdpa"
    xformers = "xformers"


@dataclass
class DenoiserConfig:
    """Settings of the UNet. Level i has `width * channel_multipliers[i]` channels at 1 / 2^i of the latent's size."""

    width: int = 128  # channels of the finest level
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Channels of each level, as multiples of `width`; the finest first."""
    num_blocks: int = 2  # residual blocks a level
    attention_levels: list[int] = field(default_factory=lambda: [1, 2])  # the middle always has attention
    head_dim: int = 64  # channels of an attention head
    attention: AttentionBackend = AttentionBackend.sdpa
    activation_checkpointing: bool | int = field(default=False, metadata={"of_training": True})
    """Recompute blocks in the backward pass: all of them, or those of so many of the finest levels."""

    def __post_init__(self) -> None:
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"model.denoiser.channel_multipliers={self.channel_multipliers} must be positive integers, one a level."
            )
        check_ranges(self, "model.denoiser", width=at_least(4), num_blocks=at_least(1), head_dim=at_least(1))
        if self.num_recomputed_levels < 0 or self.activation_checkpointing > self.num_levels:
            raise ValueError(
                f"model.denoiser.activation_checkpointing={self.activation_checkpointing} must be true, false, or a "
                f"number of levels, 0 to {self.num_levels}."
            )
        outside = [level for level in self.attention_levels if not 0 <= level < self.num_levels]
        if outside:
            raise ValueError(
                f"model.denoiser.attention_levels={self.attention_levels} must be between 0 and {self.num_levels - 1} "
                f"(one less than the number of channel_multipliers)."
            )
        for level in {*self.attention_levels, self.num_levels - 1}:
            if self.channels[level] % self.head_dim:
                raise ValueError(
                    f"model.denoiser.head_dim={self.head_dim} must divide the {self.channels[level]} channels "
                    f"of level {level}; change head_dim or width."
                )

    @property
    def num_levels(self) -> int:
        return len(self.channel_multipliers)

    @property
    def num_recomputed_levels(self) -> int:
        """Return how many levels are recomputed, from the finest on; the middle counts as the last."""
        every = self.activation_checkpointing is True
        return self.num_levels + 1 if every else int(self.activation_checkpointing)

    @property
    def channels(self) -> list[int]:
        return [self.width * multiplier for multiplier in self.channel_multipliers]


@dataclass
class DiscriminatorConfig:
    """Settings: `num_layers` stride-2 convolutions; the first has `width` channels, each further one twice as many."""

    width: int = 64  # channels of the first layer; each further one has twice as many
    num_layers: int = 3  # convolutions of stride 2

    def __post_init__(self) -> None:
        check_ranges(self, "model.discriminator", width=at_least(2), num_layers=at_least(1))


class LatentKind(Enum):
    """Readings of z_0: what it is the latent of."""

    image = "image"
    mask = "mask"
    residual = "residual"

    @property
    def sees_strong_view(self) -> bool:
        """Tell whether the condition comes from the strongly augmented view, not from the clean one."""
        return self is not LatentKind.mask

    @property
    def is_of_labels(self) -> bool:
        """Tell whether z_0, and so z_t wherever it is not pure noise, gives the labels away."""
        return self is not LatentKind.image

    @property
    def needs_clean_view(self) -> bool:
        """Tell whether z_0 is E's latent of the clean view."""
        return self is LatentKind.image

    @property
    def has_mask_encoder(self) -> bool:
        """Tell whether M makes z_0 of labels."""
        return self is LatentKind.mask

    @property
    def is_a_move(self) -> bool:
        """Tell whether z_0 is a move of E's latent, which the decoder sees added to it."""
        return self is LatentKind.residual


class ConditionKind(Enum):
    """Kinds of condition. `latent`: E's latent alone (the paper); `rich`: also features, probabilities, image, place.

    Of a rich condition, the features are E's, and the probabilities are D's for E's latent.
    """

    latent = "latent"
    rich = "rich"


@dataclass
class ModelConfig:
    """Settings of all boxes of the figure, of the reading of z_0, and of the latent's channels."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    latent: LatentKind = LatentKind.residual
    latent_channels: int = 16  # channels of the latent; 4 will do for masks
    condition: ConditionKind = field(default=ConditionKind.rich, metadata={"when_absent": "latent"})
    residual_steps: int = field(default=4, metadata={"when_absent": 4})
    """Gradient steps towards the labels, if the latent is `residual`."""
    residual_step: float = field(default=0.1, metadata={"when_absent": 0.1})
    """Length of each of these steps, in standard deviations of the latent."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "model",
            residual_steps=at_least(1, "use 4"),
            residual_step=above(0, "use 0.1"),
            latent_channels=at_least(1, "use 16, or 4 for masks"),
        )
