"""Stage 2: the denoiser learns to predict noise so that a discriminator cannot tell the three domains apart.

Method: L2 = ||noise_pred - noise||^2 + lambda_adv * L_adv(discriminator(noise_pred, t)). E and D are frozen.
`C h w` latent, `T` diffusion steps; domains are ordered source, target, mixed.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from iccld import rng
from iccld.labels import IGNORE_INDEX
from iccld.models.discriminator import Discriminator
from iccld.models.encoder import EncoderOutput
from iccld.models.iccld import ICCLD
from iccld.models.latent import latent_pair
from iccld.models.model_card import ModelStage
from iccld.stages.adversarial_module import LABELLED, AdversarialModule
from iccld.stages.base import Stage, StageInputs, decayed_groups, keyed_noise
from iccld.stages.denoising import Noised, draw_timesteps, noised, without_noise
from iccld.stages.domains import DOMAINS, Images, Labels, encoded_of, mixed_images, mixed_labels, of_domains
from iccld.stages.objective import AdversarialConfig, AdversaryInput
from iccld.uda.photometric import NUM_DRAWS, strong_augment
from iccld.uda.pseudo_labels import PseudoLabels, pseudo_labels
from iccld.uda.teacher import Teacher

__all__ = ["NOISE", "AdversarialConfig", "AdversarialModule", "AdversarialStage", "AdversaryInput"]
NOISE = tuple(f"noise {domain}" for domain in DOMAINS)
"""The purposes of its noise; that of all three is keyed by the source's numbers."""


class AdversarialStage(Stage):
    """Stage 2 of the method. `model` brings E and D from stage 1 and the latent's statistics."""

    name = "stage2"
    module: AdversarialModule

    def __init__(self, model: ICCLD, discriminator: Discriminator, config: AdversarialConfig, *, seed: int) -> None:
        _check_task_loss(model, config)
        self.model, self.config, self.seed = model, config, seed
        model.stage, model.deterministic = ModelStage.adversarial, config.deterministic
        for part in self.frozen():
            part.requires_grad_(False).eval()
        self.module = AdversarialModule(model, discriminator, config)
        self.student, self.ema_profile = self.module.denoiser, config.ema_profile
        self.teacher = Teacher(self.student, max_decay=config.teacher_decay)

    def prepare(self, batch: Mapping[str, Any], step: int) -> StageInputs:
        numbers = batch["source"]["numbers"]
        images = mixed_images(batch, self._uniform(self.model.num_classes, "classmix", batch["target"]["numbers"]))
        clean, seen = self._encoded(images, numbers)
        labels = self._labels(batch, images, clean)
        z_0, condition = latent_pair(
            self.model, clean=clean.latent, seen=seen.latent, labels=labels.labels if labels else None
        )
        given = self._noised(batch, z_0)
        tensors = {"z_0": z_0, "condition": condition} | given._asdict() | self._weights(len(numbers), step, z_0.device)
        denominators = {
            "diffusion": tensors["diffusion_weights"].sum(),
            "adversarial": torch.full((), float(len(z_0)), device=z_0.device),
        }
        if self.config.task_weight:
            assert labels is not None
            tensors |= {f"features_{i}": level for i, level in enumerate(seen.features)}
            tensors |= self._task_tensors(labels, given.is_pure)
            denominators |= {f"task_{name}": tensors.pop(f"{name}_count") for name in LABELLED}
        return StageInputs(tensors, denominators)

    def _encoded(self, images: Images, numbers: Tensor) -> tuple[EncoderOutput, EncoderOutput]:
        """E's output of the clean view and of the one that the denoiser sees, each of all domains.

        E passes an image once: the target's features are also what its pseudo-labels are decoded from.
        """
        clean = self.model.encoder(images.images)
        if not self.model.config.latent.sees_strong_view:
            return clean, clean
        draws = torch.cat([self._uniform(NUM_DRAWS, f"strong view {domain}", numbers) for domain in DOMAINS])
        return clean, self.model.encoder(strong_augment(images.images, draws, self.config.photometric))

    def _labels(self, batch: Mapping[str, Any], images: Images, clean: EncoderOutput) -> Labels | None:
        """The labels of all domains; None where neither z_0 nor a loss is of labels."""
        if not (self.model.config.latent.is_of_labels or self.config.task_weight):
            return None
        return mixed_labels(batch["source"]["labels"], self._pseudo_labels(batch, clean), images.pasted)

    def _pseudo_labels(self, batch: Mapping[str, Any], clean: EncoderOutput) -> PseudoLabels:
        target = batch["target"]
        logits = self.model.decode(encoded_of(clean, ["target"]), target["images"].shape[-2:])
        return pseudo_labels(logits, threshold=self.config.confidence_threshold, valid=target["valid"])

    def _noised(self, batch: Mapping[str, Any], z_0: Tensor) -> Noised:
        numbers, alpha_bar, share = batch["source"]["numbers"], self.model.alpha_bar, self.config.pure_noise_share
        if self.config.deterministic:
            return without_noise(z_0, alpha_bar)
        draws = torch.cat([self._uniform(1, f"timestep {domain}", numbers)[:, 0] for domain in DOMAINS])
        pure = torch.cat([self._uniform(1, f"pure noise {domain}", numbers)[:, 0] for domain in DOMAINS])
        timesteps = draw_timesteps(draws, pure, pure_noise_share=share, num_steps=len(alpha_bar))
        shape = z_0.shape[1:]
        noise = torch.cat([keyed_noise(batch["source"], purpose, shape, seed=self.seed) for purpose in NOISE])
        return noised(z_0, noise, timesteps, alpha_bar)

    def _weights(self, count: int, step: int, device: torch.device) -> dict[str, Tensor]:
        """Which domain a sample is of, and what the losses weigh; `count` samples a domain.

        Filled on the device: a tensor made from the host's numbers is a copy that the host waits for.
        """
        config = self.config
        ramp = min(1.0, (step + 1) / max(1, config.adversarial_ramp_steps))
        return {
            "domains": torch.arange(3, device=device).repeat_interleave(count),
            "diffusion_weights": torch.cat([torch.full((count,), w, device=device) for w in config.domain_weights]),
            "adversarial_weight": torch.full((), ramp * config.adversarial_weight, device=device),
        }

    def _task_tensors(self, labels: Labels, is_pure: Tensor) -> dict[str, Tensor]:
        """Labels, pixel weights and number of valid pixels for the task loss.

        Where z_t is made of labels, only samples whose z_t is pure noise count: the others' tells them.
        """
        counted, weights = labels.labels != IGNORE_INDEX, labels.weights
        if self.model.config.latent.is_of_labels:
            counted, weights = counted & is_pure[:, None, None], weights * is_pure[:, None, None]
        tensors = {}
        for name in LABELLED:
            tensors[f"{name}_labels"] = of_domains(labels.labels, [name])
            tensors[f"{name}_weights"] = of_domains(weights, [name])
            tensors[f"{name}_count"] = of_domains(counted, [name]).sum().float()
        return tensors

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


def _check_task_loss(model: ICCLD, config: AdversarialConfig) -> None:
    pure = config.deterministic or config.pure_noise_share > 0
    if config.task_weight and model.config.latent.is_of_labels and not pure:
        raise ValueError(
            f"stage2.objective.task_weight={config.task_weight} with model.latent={model.config.latent.name} counts "
            f"samples of pure noise alone (in all others z_t tells the labels); set stage2.objective.pure_noise_share "
            f"above 0."
        )
