"""E: image to latent and multi-scale features, over any backbone of `transformers`.

`B H W` images, `C` latent channels; strides 4, 8, 16, 32 of the features, 8 of the latent.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from iccld.graph import nodes_behind
from iccld.models.backbone import (
    KNOWN_TYPES,
    make_backbone,
    recompute_layers,
    record_hidden_states_alone,
    refuse_missing,
    warn_of_other_normalisation,
)
from iccld.models.blocks import FeatureFusion, conv_block
from iccld.models.settings import EncoderConfig
from iccld.outcome import lacks_memory
from iccld.strides import COARSEST_STRIDE, FEATURE_STRIDES, LATENT_STRIDE

FORWARD_OPTIONS = {
    # Swin's maps of a stage before it is shrunk. Without always_partition one small image would shrink the module's
    # windows for good, so that later outputs depend on earlier inputs.
    "swin": {"always_partition": True, "output_hidden_states_before_downsampling": True},
}


class EncoderOutput(NamedTuple):
    """`latent` `(B, C, h, w)`, stride 8; `features`: `(B, C_s, ., .)` of strides 4, 8, 16, 32; sizes are rounded up."""

    latent: Tensor
    features: tuple[Tensor, ...]


class _FeatureTaps(NamedTuple):
    """The hidden states of a backbone that give the features, their channels, and the parameters that none needs."""

    taps: tuple[int, ...]
    channels: tuple[int, ...]
    unused: frozenset[str]


_TAPS: dict[str, _FeatureTaps] = {}  # by the backbone's config; finding them takes longer than building a small model


class Encoder(nn.Module):
    """Backbone, then a head that fuses its four scales into the latent."""

    def __init__(self, *, config: EncoderConfig, latent_channels: int) -> None:
        super().__init__()
        self.backbone, missing = make_backbone(config.pretrained, config.backbone_config)
        warn_of_other_normalisation(config)
        self.train()  # before anything passes the backbone, or BatchNorm would take it for data
        self.options = FORWARD_OPTIONS.get(self.backbone.config.model_type, {})
        self.register_buffer("image_mean", torch.tensor(config.image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(config.image_std).view(1, 3, 1, 1), persistent=False)
        record_hidden_states_alone(self.backbone)
        _freeze_batch_norm(self.backbone)
        self.taps, self.feature_channels, unused = self._feature_taps()
        self._freeze(unused)
        refuse_missing(config.pretrained, sorted(missing - unused))
        if config.activation_checkpointing:
            recompute_layers(self.backbone)
        self.fusion = FeatureFusion(feature_channels=self.feature_channels, out_channels=config.width)
        self.latent_head = nn.Sequential(
            conv_block(config.width, config.width), nn.Conv2d(config.width, latent_channels, 1)
        )

    def forward(self, images: Tensor) -> EncoderOutput:
        """Encode `(B, 3, H, W)` float RGB in [0, 1], of any size."""
        height, width = (-(-side // LATENT_STRIDE) * LATENT_STRIDE for side in images.shape[-2:])
        padded = _pad((images - self.get_buffer("image_mean")) / self.get_buffer("image_std"))
        # Convolutions keep their input's layout; the weights stay contiguous, as engines and checkpoints want them.
        padded = padded.contiguous(memory_format=torch.channels_last)
        features = []
        for x, stride in zip(self._maps(padded), FEATURE_STRIDES, strict=True):
            x = _resize(x, (padded.shape[-2] // stride, padded.shape[-1] // stride))
            features.append(x[..., : -(-height // stride), : -(-width // stride)])
        size = (height // LATENT_STRIDE, width // LATENT_STRIDE)
        fused = self.fusion(features, to_stride=LATENT_STRIDE, size=size)
        return EncoderOutput(self.latent_head(fused), tuple(features))

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a backbone's BatchNorm stays frozen, as its statistics would mix domains and ranks."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Return the four tapped states as maps, of the backbone's own sizes. images: normalised, sides multiples of
        32.
        """
        states = self._states(images)
        return [self._to_map(states[tap], images) for tap in self.taps]

    def _states(self, images: Tensor) -> Sequence[Tensor]:
        patch = getattr(self.backbone.config, "patch_size", 1)
        if isinstance(patch, int) and COARSEST_STRIDE % patch:
            images = _resize(images, [-(-side // patch) * patch for side in images.shape[-2:]])
        output = self.backbone(images, output_hidden_states=True, **self.options)
        return getattr(output, "reshaped_hidden_states", None) or output.hidden_states

    def _to_map(self, state: Tensor, images: Tensor) -> Tensor:
        """Return a map `(B, C, ., .)`: a ViT's tokens `(B, N, C)` are normalised as its last layer's are, then laid
        out.
        """
        if state.dim() == 4:
            return state
        patch = self.backbone.config.patch_size
        rows, columns = (-(-side // patch) for side in images.shape[-2:])
        norms = [child for child in self.backbone.children() if isinstance(child, nn.LayerNorm)]
        tokens = norms[0](state)[:, -rows * columns :]  # class and register tokens come first
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def _feature_taps(self) -> _FeatureTaps:
        """Find the taps by a pass through the backbone, of which a process makes one for each config."""
        if self.backbone.main_input_name != "pixel_values":
            raise ValueError(
                f"model.encoder: a backbone of type {self.backbone.config.model_type!r} gives no feature maps; "
                f"use one of {KNOWN_TYPES}."
            )
        key = self.backbone.config.to_json_string(use_diff=False)
        if torch.is_inference_mode_enabled():  # without a graph, no parameter seems to be needed
            return self._find_taps()
        if key not in _TAPS:
            _TAPS[key] = self._find_taps()
        return _TAPS[key]

    def _find_taps(self) -> _FeatureTaps:
        """Find the taps. Raises ValueError for a backbone of another design."""
        try:
            return self._taps_of_a_pass()
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if lacks_memory(error):
                raise
            raise ValueError(
                f"model.encoder: a backbone of type {self.backbone.config.model_type!r}, of this config, gives no "
                f"feature maps ({str(error).strip().partition(chr(10))[0]}); use one of {KNOWN_TYPES}."
            ) from error

    def _taps_of_a_pass(self) -> _FeatureTaps:
        images = torch.zeros(1, 3, 2 * COARSEST_STRIDE, 2 * COARSEST_STRIDE)
        with torch.enable_grad():
            states = self._states(images)
            taps = _choose_taps([state.shape for state in states], side=images.shape[-1])
            nodes = nodes_behind([self._to_map(states[tap], images) for tap in taps])
        used = {id(node.variable) for node in nodes if hasattr(node, "variable")}
        trainable = {name: p for name, p in self.backbone.named_parameters() if p.requires_grad}
        unused = frozenset(name for name, p in trainable.items() if id(p) not in used)
        channels = tuple(states[tap].shape[-1 if states[0].dim() == 3 else 1] for tap in taps)
        return _FeatureTaps(taps, channels, unused)

    @property
    def can_recompute(self) -> bool:
        """Tell whether `activation_checkpointing` can be set."""
        return self.backbone.supports_gradient_checkpointing

    def _freeze(self, unused: Collection[str]) -> None:
        """Freeze the parameters that no feature depends on.

        A parameter that trains without ever getting a gradient stalls DDP, and weight decay shrinks it for nothing.
        """
        for name, parameter in self.backbone.named_parameters():
            if name in unused:
                parameter.requires_grad_(False)


def _freeze_batch_norm(backbone: nn.Module) -> None:
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)


def _choose_taps(shapes: Sequence[Sequence[int]], *, side: int) -> tuple[int, ...]:
    """Choose a hidden state for each stride: the last of that stride, or the nearest finer.

    A ViT has one scale; its states at a quarter, half, three quarters and the end of its depth stand for the four.
    `shapes`: of the states, of images of this side.
    """
    if len(shapes[0]) == 3:  # a ViT's tokens
        depth = len(shapes) - 1
        return tuple(-(-depth * quarter // 4) for quarter in (1, 2, 3, 4))
    strides = [side // shape[-1] for shape in shapes]
    taps = []
    for stride in FEATURE_STRIDES:
        finer = max((s for s in strides if s <= stride), default=min(strides))
        taps.append(max(i for i, s in enumerate(strides) if s == finer))
    return tuple(taps)


def _pad(images: Tensor) -> Tensor:
    """Repeat the last row and column until both sides are multiples of 32, so that every stride divides them."""
    bottom, right = (-side % COARSEST_STRIDE for side in images.shape[-2:])
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if x.shape[-1] >= size[1] and x.shape[-2] >= size[0]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)
