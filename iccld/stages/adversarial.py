"""Stage 2: the denoiser learns to predict noise so that a discriminator cannot tell the three domains apart.

Method: L2 = ||noise_pred - noise||^2 + lambda_adv * L_adv(discriminator(noise_pred, t)). E and D are frozen.
Denoiser and discriminator live in one module under one optimiser: the denoiser's term sees the discriminator with
detached parameters, the discriminator's term sees detached predictions, so one backward serves both.
`C h w` latent, `T` diffusion steps; domains are ordered source, target, mixed.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from iccld import rng
from iccld.diffusion import add_noise, predict_z_0
from iccld.losses import domain_confusion, domain_cross_entropy, noise_mse
from iccld.models.discriminator import Discriminator
from iccld.models.encoder import EncoderOutput
from iccld.models.iccld import ICCLD
from iccld.models.latent import latent_pair
from iccld.models.model_card import ModelStage
from iccld.stages.base import Stage, StageInputs, StageOutput, decayed_groups, keyed_noise, pair, to_float
from iccld.uda.classmix import class_mask, paste
from iccld.uda.ema_profile import EmaProfileConfig
from iccld.uda.photometric import NUM_DRAWS, PhotometricConfig, strong_augment
from iccld.uda.teacher import Teacher

DOMAINS = ("source", "target", "mixed")
NOISE = tuple(f"noise {domain}" for domain in DOMAINS)
"""The purposes of its noise; that of all three is keyed by the source's numbers."""
NUM_TIMESTEP_BINS = 4


class AdversaryInput(Enum):
    """What the discriminator sees: predicted noise (the paper), the clean latent it implies, or the UNet's middle."""

    noise = "noise"
    z0 = "z0"
    features = "features"


@dataclass
class AdversarialConfig:
    """Stage 2. `domain_weights` are those of the diffusion term for source, target, mixed; 0 leaves a domain out."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    discriminator_learning_rate: float = 1e-4
    teacher_decay: float = 0.999
    adversarial_weight: float = 1e-3
    adversarial_ramp_steps: int = 1000
    adversary_input: AdversaryInput = AdversaryInput.noise
    domain_weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    ema_profile: EmaProfileConfig = field(default_factory=EmaProfileConfig)

    def __post_init__(self) -> None:
        if len(self.domain_weights) != 3 or min(self.domain_weights) < 0 or sum(self.domain_weights) == 0:
            raise ValueError(
                f"stage2.objective.domain_weights={self.domain_weights} must be three weights >= 0 "
                f"(source, target, mixed), not all 0."
            )
        for name in ("adversarial_weight", "adversarial_ramp_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"stage2.objective.{name}={getattr(self, name)} must be 0 (off) or above.")
        for name in ("learning_rate", "discriminator_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"stage2.objective.{name}={getattr(self, name)} must be above 0.")
        if not 0.0 <= self.teacher_decay <= 1.0:
            raise ValueError(f"stage2.objective.teacher_decay={self.teacher_decay} must be between 0 and 1.")


class AdversarialModule(nn.Module):
    """What trains in stage 2: the denoiser and the discriminator."""

    alpha_bar: Tensor

    def __init__(self, model: ICCLD, discriminator: Discriminator, config: AdversarialConfig) -> None:
        super().__init__()
        assert model.denoiser is not None
        self.denoiser, self.discriminator, self.config = model.denoiser, discriminator, config
        self.register_buffer("alpha_bar", model.alpha_bar.clone(), persistent=False)

    def forward(self, inputs: StageInputs) -> StageOutput:
        """Losses of the micro-batch; the three domains pass the denoiser together (no layer mixes samples)."""
        tensors, denominators = inputs
        z_t, t, noise = tensors["z_t"], tensors["t"], tensors["noise"]
        prediction = self.denoiser(z_t, t, tensors["condition"])
        weights = tensors["diffusion_weights"]
        losses = {"diffusion": noise_mse(prediction.noise_pred, noise, weights) / denominators["diffusion"]}
        seen = self._seen(prediction, z_t, t)
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        count = denominators["adversarial"]
        confusion = domain_confusion(functional_call(self.discriminator, frozen, (seen, t))).sum() / count
        losses["adversarial"] = tensors["adversarial_weight"] * confusion
        logits = self.discriminator(seen.detach(), t)
        losses["discriminator"] = domain_cross_entropy(logits, tensors["domains"]).sum() / count
        return StageOutput(losses, self._metrics(logits, tensors))

    def _seen(self, prediction: Any, z_t: Tensor, t: Tensor) -> Tensor:
        if self.config.adversary_input is AdversaryInput.features:
            return prediction.middle
        if self.config.adversary_input is AdversaryInput.z0:
            return predict_z_0(z_t, prediction.noise_pred, t, self.alpha_bar)
        return prediction.noise_pred

    def _metrics(self, logits: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The discriminator's accuracy per domain and timestep bin: 1/3 says nothing, near 1 is a give-away."""
        domains, t = tensors["domains"], tensors["t"]
        right = (logits.mean(dim=(2, 3)).argmax(dim=1) == domains).float()
        bins = t * NUM_TIMESTEP_BINS // len(self.alpha_bar)
        metrics = {}
        for i, domain in enumerate(DOMAINS):
            metrics[f"accuracy/{domain}"] = pair((right * (domains == i)).sum(), (domains == i).sum())
        for i in range(NUM_TIMESTEP_BINS):
            metrics[f"accuracy/t_bin_{i}"] = pair((right * (bins == i)).sum(), (bins == i).sum())
        return metrics


class AdversarialStage(Stage):
    """Stage 2 of the method. `model` brings E and D from stage 1 and the latent's statistics."""

    name = "stage2"
    module: AdversarialModule

    def __init__(self, model: ICCLD, discriminator: Discriminator, config: AdversarialConfig, *, seed: int) -> None:
        self.model, self.config, self.seed = model, config, seed
        model.stage = ModelStage.adversarial
        for part in self.frozen():
            part.requires_grad_(False).eval()
        self.module = AdversarialModule(model, discriminator, config)
        self.student, self.ema_profile = self.module.denoiser, config.ema_profile
        self.teacher = Teacher(self.student, max_decay=config.teacher_decay)

    def prepare(self, batch: Mapping[str, Any], step: int) -> StageInputs:
        numbers, device = batch["source"]["numbers"], batch["source"]["images"].device
        clean, labels, clean_latent = self._domains(batch)
        draws = torch.cat([self._uniform(NUM_DRAWS, f"strong view {domain}", numbers) for domain in DOMAINS])
        strong = strong_augment(clean, draws, self.config.photometric)
        z_0, condition = latent_pair(self.model, clean=clean_latent, strong_images=strong, labels=labels)
        num_steps = len(self.model.alpha_bar)
        t = torch.cat([self._uniform(1, f"timestep {domain}", numbers)[:, 0] for domain in DOMAINS])
        t = rng.to_device((t * num_steps).long(), device)
        shape = z_0.shape[1:]
        noise = torch.cat([keyed_noise(batch["source"], purpose, shape, seed=self.seed) for purpose in NOISE])
        domains = torch.arange(3, device=device).repeat_interleave(len(numbers))
        # Filled on the device: a tensor made from the host's numbers is a copy that the host waits for.
        weights = self.config.domain_weights
        ramp = min(1.0, (step + 1) / max(1, self.config.adversarial_ramp_steps))
        tensors = {
            "z_t": add_noise(z_0, noise, t, self.model.alpha_bar),
            "t": t,
            "noise": noise,
            "condition": condition,
            "domains": domains,
            "diffusion_weights": torch.cat([torch.full((len(numbers),), w, device=device) for w in weights]),
            "adversarial_weight": torch.full((), ramp * self.config.adversarial_weight, device=device),
        }
        return StageInputs(
            tensors,
            {
                "diffusion": tensors["diffusion_weights"].sum(),
                "adversarial": torch.full((), float(len(t)), device=device),
            },
        )

    def _domains(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images `(3B, 3, H, W)`, labels `(3B, H, W)` and E's latent `(3B, C, h, w)` of source, target, mixed.

        E passes an image once: the target's features are also what its pseudo-labels are decoded from. Where z_0 is
        not of labels, there are none.
        """
        source, target = to_float(batch["source"]["images"]), to_float(batch["target"]["images"])
        source_labels = batch["source"]["labels"]
        scores = self._uniform(self.model.num_classes, "classmix", batch["target"]["numbers"])
        mask = class_mask(source_labels, scores)
        mixed = paste(mask, source, target)
        images = torch.cat([source, target, mixed])
        encoded = self.model.encoder(images)
        if self.model.mask_encoder is None:
            return images, None, encoded.latent
        of_target = EncoderOutput(encoded.latent.chunk(3)[1], tuple(f.chunk(3)[1] for f in encoded.features))
        target_labels = self.model.decode(of_target, target.shape[-2:]).argmax(dim=1).to(source_labels.dtype)
        labels = torch.cat([source_labels, target_labels, paste(mask, source_labels, target_labels)])
        return images, labels, encoded.latent

    def _uniform(self, count: int, purpose: str, numbers: Tensor) -> Tensor:
        return rng.uniform(count, seed=self.seed, purpose=f"stage2 {purpose}", numbers=numbers)

    def param_groups(self) -> list[dict[str, Any]]:
        config, module = self.config, self.module
        return [
            *decayed_groups(
                module.denoiser.named_parameters(), learning_rate=config.learning_rate, weight_decay=config.weight_decay
            ),
            {
                "params": list(module.discriminator.parameters()),
                "lr": config.discriminator_learning_rate,
                "betas": (0.9, 0.99),
                "weight_decay": 0.0,
            },
        ]

    def parts(self) -> dict[str, nn.Module]:
        return dict(self.model.named_children()) | super().parts()

    def models(self) -> dict[str, ICCLD]:
        teacher = copy.deepcopy(self.model)
        teacher.denoiser = self.teacher.module
        return {"teacher": teacher, "student": self.model}

    def frozen(self) -> list[nn.Module]:
        parts = [self.model.encoder, self.model.decoder, self.model.mask_encoder]
        return [part for part in parts if part is not None]

    def replicated(self) -> list[nn.Module]:
        return [self.module.discriminator]
