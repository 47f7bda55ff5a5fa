"""The whole figure: encoder, denoiser, decoder. `B H W` images, `C h w` latent (stride 8), `K` classes."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from iccld.diffusion import sample, scaled_linear_alpha_bar
from iccld.durable import file_checksum, make_folder, write_whole
from iccld.models.condition import ConditionParts, ConditionProjection
from iccld.models.decoder import Decoder
from iccld.models.denoiser import Denoiser
from iccld.models.encoder import Encoder, EncoderOutput
from iccld.models.latent import denormalise, make_mask_encoder, moments_to_statistics, normalise
from iccld.models.model_card import (
    CARD_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    ModelCard,
    ModelStage,
    build,
    read_card,
    to_plain,
    write_card,
)
from iccld.models.readme import README_NAME, describe
from iccld.models.residual import fitted_residual, residual_scale
from iccld.models.saved_model import check_described, check_weights, described_by, save_tensors, without_denoiser
from iccld.models.settings import AttentionBackend, ConditionKind, ModelConfig
from iccld.solver import Solver
from iccld.strides import LATENT_STRIDE, LOGITS_STRIDE

logger = logging.getLogger(__name__)


class ICCLD(nn.Module):
    """The whole model: images in [0, 1] to logits, with or without diffusion.

    Stage 1 needs no denoiser: `with_denoiser=False` leaves it out. `stage` says whether the denoiser is trained; the
    stage that trains it sets `ModelStage.adversarial`. `deterministic`: the denoiser never saw noise, so it is asked
    once, with z_t = 0 (the control of stage 2).
    """

    alpha_bar: Tensor
    latent_mean: Tensor
    latent_std: Tensor
    condition_mean: Tensor
    condition_std: Tensor

    def __init__(self, *, config: ModelConfig, num_classes: int, with_denoiser: bool = True) -> None:
        super().__init__()
        if not 2 <= num_classes <= 255:
            raise ValueError(f"num_classes={num_classes} must be between 2 and 255 (255 means ignore in labels).")
        channels = config.latent_channels
        self.config, self.num_classes = config, num_classes
        self.stage = ModelStage.segmentation
        self.deterministic = False
        self.card: ModelCard | None = None
        self.encoder = Encoder(config=config.encoder, latent_channels=channels)
        self.decoder = Decoder(
            config=config.decoder,
            latent_channels=channels,
            feature_channels=self.encoder.feature_channels,
            num_classes=num_classes,
        )
        self.mask_encoder = make_mask_encoder(config.latent, num_classes=num_classes, latent_channels=channels)
        # Last, so that the seed gives E and D the same initial weights with and without it.
        self.denoiser = self._new_denoiser() if with_denoiser else None
        self.register_buffer("alpha_bar", scaled_linear_alpha_bar(), persistent=False)
        for name in ("latent", "condition"):
            self.register_buffer(f"{name}_mean", torch.zeros(channels))
            self.register_buffer(f"{name}_std", torch.ones(channels))

    def forward(self, images: Tensor, *, noise: Tensor | None = None, num_steps: int = 0) -> Tensor:
        """Call `segment` or, with noise, `denoise_segment`: `(B, 3, H, W)` in [0, 1] to logits `(B, K, H, W)`."""
        if noise is None:
            if num_steps:
                raise ValueError(f"forward: num_steps={num_steps} starts from noise; give noise of shape latent_shape.")
            return self.segment(images)
        return self.denoise_segment(images, noise=noise, num_steps=num_steps)

    def segment(self, images: Tensor) -> Tensor:
        """Compute D(E(x)): `(B, 3, H, W)` float in [0, 1] to logits `(B, K, H, W)`."""
        return self.decode(self.encoder(images), images.shape[-2:])

    def decode(self, encoded: EncoderOutput, size: Sequence[int]) -> Tensor:
        """Decode E's output with D: logits `(B, K, *size)`; `size` is the images'."""
        return _to_image_size(self.decoder(encoded.latent, encoded.features), size)

    def denoise_segment(
        self, images: Tensor, *, noise: Tensor, num_steps: int, solver: Solver = Solver.ddim, start: float = 1.0
    ) -> Tensor:
        """Encode, denoise from `noise` (`latent_shape` per image) in `num_steps`, decode: logits `(B, K, H, W)`.

        start: below 1, from that share of the diffusion's steps on, E's latent being the guess. A `deterministic` model
        takes one step without noise, whatever is given.
        """
        denoiser = self._trained_denoiser()
        encoded = self.encoder(images)
        if noise.shape != encoded.latent.shape:
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} does not fit images of shape {tuple(images.shape)}; "
                f"draw it with shape {tuple(encoded.latent.shape)} (latent_shape gives it)."
            )
        condition = self.condition_of(encoded, images)
        if self.deterministic:
            noise, num_steps, start = torch.zeros_like(noise), 1, 1.0
        guess = None if start == 1.0 else self._guess_of(encoded, images.shape[-2:])

        def denoise(z_t: Tensor, t: Tensor) -> Tensor:
            return denoiser(z_t, t, condition).z_0_pred

        z_0 = sample(denoise, noise, self.alpha_bar, num_steps, solver=solver, guess=guess, start=start)
        return self.decode(EncoderOutput(self.decodable(z_0, encoded.latent), encoded.features), images.shape[-2:])

    def condition_of(self, encoded: EncoderOutput, images: Tensor) -> Tensor | ConditionParts:
        """Build what the denoiser sees of a view: `images` `(B, 3, H, W)` in [0, 1], and what E gave for them."""
        latent = normalise(encoded.latent, mean=self.condition_mean, std=self.condition_std)
        if self.config.condition is ConditionKind.latent:
            return latent
        logits = self.decoder(encoded.latent, encoded.features).float()
        probabilities = F.avg_pool2d(logits.softmax(dim=1), LATENT_STRIDE // LOGITS_STRIDE)
        return ConditionParts(latent, encoded.features[1:], probabilities, images)

    def diffused_latent(
        self, *, clean: Tensor | None, seen: EncoderOutput, labels: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        """Return z_0 as it is diffused, `(B, C, h, w)` float32 of about zero mean and unit variance per channel.

        clean: E's latent of the clean view, where `LatentKind.needs_clean_view`. seen: E's output of the view that the
        denoiser sees. labels: `(B, H, W)` uint8 or int64, 255 is ignored, where `LatentKind.is_of_labels`. weights:
        `(B, H, W)` float32 >= 0, where `LatentKind.is_a_move`.
        """
        if not self.config.latent.is_a_move:
            return normalise(self.encoded_z_0(clean, labels), mean=self.latent_mean, std=self.latent_std)
        assert labels is not None and weights is not None

        def decode(latent: Tensor) -> Tensor:
            return self.decoder(latent, seen.features)

        return fitted_residual(decode, seen.latent, labels, weights, std=self.latent_std, **self._residual_options())

    def decodable(self, z_0: Tensor, encoded_latent: Tensor) -> Tensor:
        """Return the latent that D decodes, of a clean latent as it is diffused; all `(B, C, h, w)`.

        encoded_latent: E's, of the view that the denoiser sees; a z_0 that `is_a_move` moves it.
        """
        if self.config.latent.is_a_move:
            return encoded_latent.float() + residual_scale(self.latent_std, **self._residual_options()) * z_0
        return denormalise(z_0, mean=self.latent_mean, std=self.latent_std)

    def _guess_of(self, encoded: EncoderOutput, image_size: torch.Size) -> Tensor:
        """Return z_0 as stage 1 would have it, `(B, C, h, w)`: of E's latent, or of the labels that D reads from it."""
        if self.config.latent.is_a_move:
            return torch.zeros_like(encoded.latent)
        labels = None if self.mask_encoder is None else self.decode(encoded, image_size).argmax(dim=1)
        z_0 = self.encoded_z_0(encoded.latent, labels)
        return normalise(z_0, mean=self.latent_mean, std=self.latent_std)

    def encoded_z_0(self, clean: Tensor | None, labels: Tensor | None) -> Tensor:
        """Return z_0 `(B, C, h, w)` as the encoders give it; its statistics are measured at the end of stage 1.

        clean: E's latent of the clean view, where there is no M. labels: as `diffused_latent` takes them.
        """
        if self.mask_encoder is not None:
            assert labels is not None
            return self.mask_encoder(labels)
        assert clean is not None
        return clean

    def _residual_options(self) -> dict[str, Any]:
        return {"residual_steps": self.config.residual_steps, "residual_step": self.config.residual_step}

    def segment_mean_latent(self, images: Tensor) -> Tensor:
        """Segment with the data's mean latent as a control: what D knows from the image's features alone.

        If z_0 is a move of E's latent, nothing is moved. Returns logits `(B, K, H, W)`.
        """
        encoded = self.encoder(images)
        latent = self.decodable(torch.zeros_like(encoded.latent), encoded.latent)
        return self.decode(EncoderOutput(latent, encoded.features), images.shape[-2:])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return `(C, h, w)`, the shape of the latent of one image of this size."""
        return self.config.latent_channels, -(-height // LATENT_STRIDE), -(-width // LATENT_STRIDE)

    def set_latent_statistics(self, *, z_0: Tensor, condition: Tensor) -> None:
        """Set the latent's statistics from `channel_moments` `(3, C)`, summed over batches and ranks."""
        for name, moments in (("latent", z_0), ("condition", condition)):
            mean, std = moments_to_statistics(moments)
            self.get_buffer(f"{name}_mean").copy_(mean)
            self.get_buffer(f"{name}_std").copy_(std)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        class_names: Sequence[str],
        palette: Sequence[Sequence[int]],
        origin: dict[str, Any] | None = None,
    ) -> None:
        """Write model.safetensors, README.md and config.json (last: a torn save has none).

        An untrained denoiser is left out. origin: where the weights come from, for both cards; see `describe`.
        """
        if len(class_names) != self.num_classes:
            raise ValueError(
                f"{folder}: {len(class_names)} class_names for a model of {self.num_classes} classes; give one a class."
            )
        folder = make_folder(Path(folder), within=Path(folder))
        (folder / CARD_NAME).unlink(missing_ok=True)
        trained = self.stage.has_denoiser
        weights = self.state_dict() if trained else without_denoiser(self.state_dict())
        tensors = {name: weight.detach().cpu() for name, weight in weights.items()}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_tensors(folder / WEIGHTS_NAME, contiguous)
        checksum = file_checksum(folder / WEIGHTS_NAME)
        card = self._make_card(class_names, palette, origin or {}, checksum)
        write_whole(folder / README_NAME, describe(card))
        write_card(folder, card)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        num_classes: int | None = None,
        with_denoiser: bool | None = None,
        attention: AttentionBackend | None = None,
    ) -> Self:
        """Rebuild a saved model in eval mode, from the folder alone; `card` then holds its names, palette and origin.

        The folder may be a stranger's: no other file or host is asked, and nothing is allocated before the card's model
        is known to have the weights' names and shapes, and the weights the card's checksum.

        num_classes: refuse a model of another number of classes. with_denoiser: None, as it was saved; True gives a
        model of stage 1 a fresh one. attention: another back end than the one it was trained with.
        """
        folder = Path(folder)
        card = read_card(folder)
        if num_classes is not None and num_classes != len(card.class_names):
            raise ValueError(
                f"{folder / CARD_NAME} has {len(card.class_names)} classes, {num_classes} are asked for; "
                f"choose the class set of the model ({', '.join(card.class_names[:4])}, ...) or another model."
            )
        config = build(ModelConfig, card.model, where=str(folder / CARD_NAME))
        if attention is not None:
            config = replace(config, denoiser=replace(config.denoiser, attention=attention))
        check_described(config.encoder, folder / CARD_NAME)
        trained = card.stage.has_denoiser
        wanted = trained if with_denoiser is None else with_denoiser
        with described_by(folder / CARD_NAME), torch.device("meta"):  # the shapes alone
            shape = cls(config=config, num_classes=len(card.class_names), with_denoiser=wanted)
        weights = shape.state_dict() if trained else without_denoiser(shape.state_dict())
        check_weights(folder / WEIGHTS_NAME, card, weights, with_denoiser=wanted)
        model = cls(config=config, num_classes=len(card.class_names), with_denoiser=wanted)
        tensors = load_file(folder / WEIGHTS_NAME)
        model.load_state_dict(tensors if wanted else without_denoiser(tensors), strict=False)
        model.card, model.stage = card, card.stage if wanted else ModelStage.segmentation
        model.deterministic = wanted and card.deterministic
        return model.eval()

    def start_denoiser(self, config: ModelConfig) -> None:
        """Take a fresh denoiser, to be trained in stage 2, and what else of the model that stage decides.

        Raises ValueError if stage 1 was trained for another reading of the latent: `image` serves for `residual`.
        """
        old, new = self.config.latent, config.latent
        if old.has_mask_encoder != new.has_mask_encoder:
            raise ValueError(
                f"model.latent={new.name} needs a stage 1 of its own, this one was trained with {old.name}; "
                f"use model.latent={old.name}, or train stage 1 again."
            )
        self.config = replace(
            self.config,
            denoiser=config.denoiser,
            latent=new,
            condition=config.condition,
            residual_steps=config.residual_steps,
            residual_step=config.residual_step,
        )
        self.denoiser = self._new_denoiser()

    def _new_denoiser(self) -> Denoiser:
        config, rich = self.config, None
        if config.condition is ConditionKind.rich:
            rich = ConditionProjection(
                latent_channels=config.latent_channels,
                feature_channels=self.encoder.feature_channels[1:],
                num_classes=self.num_classes,
                width=config.denoiser.width,
            )
        return Denoiser(
            config=config.denoiser,
            latent_channels=config.latent_channels,
            condition_channels=rich.out_channels if rich else config.latent_channels,
            rich=rich,
            starts_at_zero=config.latent.is_a_move,
        )

    def _trained_denoiser(self) -> Denoiser:
        if self.denoiser is None or not self.stage.has_denoiser:
            raise ValueError(
                f"denoise_segment: this model's denoiser is {'absent' if self.denoiser is None else 'untrained'} "
                f"(stage={self.stage.value}); train stage 2 first, or use segment, which needs no denoiser."
            )
        return self.denoiser

    def rebuilding_config(self) -> dict[str, Any]:
        """Return the `ModelConfig` as plain values, with the backbone's whole config: rebuilding needs no network."""
        backbone = self.encoder.backbone.config.to_dict()
        return to_plain(
            replace(self.config, encoder=replace(self.config.encoder, pretrained="", backbone_config=backbone))
        )

    def _make_card(
        self, names: Sequence[str], palette: Sequence[Sequence[int]], origin: dict[str, Any], checksum: str
    ) -> ModelCard:
        encoder = self.config.encoder.pretrained or (self.card.origin.get("encoder", "") if self.card else "")
        origin, colours = {"encoder": encoder, **origin}, [list(map(int, c)) for c in palette]
        return ModelCard(
            FORMAT_VERSION,
            self.stage,
            list(names),
            colours,
            self.rebuilding_config(),
            origin,
            weights_sha256=checksum,
            deterministic=self.deterministic,
        )


def _to_image_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Upsample stride-4 logits, which cover the image rounded up to whole latent cells, and crop to the image.

    In float32: bf16 would round many pixels between two classes to a tie, which the class of the lower index wins.
    """
    logits = F.interpolate(logits.float(), scale_factor=float(LOGITS_STRIDE), mode="bilinear", align_corners=False)
    return logits[..., : size[0], : size[1]]
