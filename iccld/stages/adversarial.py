"""Stage 2: the denoiser learns to predict noise so that a discriminator cannot tell the three domains apart.

Method: L2 = ||noise_pred - noise||^2 + lambda_adv * L_adv(discriminator(noise_pred, t)). E and D are frozen.
`C h w` latent, `T` diffusion steps; domains are ordered source, target, mixed.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iccld.labels import IGNORE_INDEX
from iccld.models.discriminator import Discriminator, DiscriminatorConfig
from iccld.models.iccld import ICCLD
from iccld.models.model_card import ModelStage
from iccld.stages.adversarial_module import AdversarialModule
from iccld.stages.base import Stage, StageInputs, decayed_groups, keyed_noise
from iccld.stages.denoising import Noised, draw_timesteps, noised, without_noise
from iccld.stages.domains import DOMAINS, LABELLED, of_domains
from iccld.stages.named import Tensors
from iccld.stages.objective import AdversarialConfig, AdversaryInput, PseudoLabelSource
from iccld.stages.view_cache import ViewCache
from iccld.stages.views import CORRUPTION_NOISE, LABEL_NOISE, Views
from iccld.uda.teacher import Teacher

__all__ = ["AdversarialConfig", "AdversarialModule", "AdversarialStage", "AdversaryInput"]
NOISE = tuple(f"noise {domain}" for domain in DOMAINS)
"""The purposes of its noise; that of all three is keyed by the source's numbers."""


def noise_shapes(
    config: AdversarialConfig, *, latent: Sequence[int], crop_size: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """The shapes, by purpose, of the noise that a step draws for each sample."""
    shapes: dict[str, tuple[int, ...]] = {}
    if not config.deterministic:
        shapes |= dict.fromkeys(NOISE, tuple(latent))
        if config.pseudo_labels is PseudoLabelSource.denoiser:
            shapes |= dict.fromkeys(LABEL_NOISE[: 1 + config.flip_teacher], tuple(latent))
    if config.corruption.strength:
        shapes[CORRUPTION_NOISE] = (3, *crop_size)
    return shapes


def new_discriminator(model: ICCLD, objective: AdversarialConfig, config: DiscriminatorConfig) -> Discriminator:
    """A discriminator of what the objective shows it."""
    assert model.denoiser is not None
    channels = {AdversaryInput.features: model.denoiser.middle_channels, AdversaryInput.map: model.num_classes}
    in_channels = channels.get(objective.adversary_input, model.config.latent_channels)
    return Discriminator(config=config, in_channels=in_channels, num_domains=len(objective.adversary_domains))


class AdversarialStage(Stage):
    """Stage 2 of the method. `model` brings E and D from stage 1 and the latent's statistics."""

    name = "stage2"
    module: AdversarialModule

    def __init__(self, model: ICCLD, discriminator: Discriminator, config: AdversarialConfig, *, seed: int) -> None:
        _check_labels(model, config)
        self.model, self.config, self.seed = model, config, seed
        model.stage, model.deterministic = ModelStage.adversarial, config.deterministic
        for part in self.frozen():
            part.requires_grad_(False).eval()
        self.views = Views(model, config, seed)
        self.view_cache: ViewCache | None = None
        self.module = AdversarialModule(model, discriminator, config)
        self.student, self.ema_profile = self.module.denoiser, config.ema_profile
        self.teacher = Teacher(self.student, max_decay=config.teacher_decay)

    def prepare(self, batch: Mapping[str, Any], step: int) -> StageInputs:
        tensors = self.views(batch) if self.view_cache is None else self.view_cache(batch, self.views)
        if self.views.are_labelled_by_denoiser:
            tensors = self.views.with_own_labels(batch, tensors, self.teacher.module)
        z_0 = tensors["z_0"]
        count, given = len(z_0) // len(DOMAINS), self._noised(batch, z_0)
        tensors |= given._asdict() | self._weights(count, step, z_0.device)
        denominators = {"diffusion": tensors["diffusion_weights"].sum()}
        seen = {"adversarial": self.config.moved_domains, "discriminator": self.config.adversary_domains}
        for name, domains in seen.items():
            denominators[name] = torch.full((), float(count * len(domains)), device=z_0.device)
        if self.config.task_weight:
            denominators |= self._restrict_labels(tensors, given.is_pure)
        return StageInputs(tensors, denominators)

    def _noised(self, batch: Mapping[str, Any], z_0: Tensor) -> Noised:
        numbers, alpha_bar, share = batch["source"]["numbers"], self.model.alpha_bar, self.config.pure_noise_share
        if self.config.deterministic:
            return without_noise(z_0, alpha_bar)
        draws, pure = (
            torch.cat([self.views.uniform(1, f"{purpose} {domain}", numbers)[:, 0] for domain in DOMAINS])
            for purpose in ("timestep", "pure noise")
        )
        timesteps = draw_timesteps(draws, pure, pure_noise_share=share, num_steps=len(alpha_bar))
        if self.model.config.latent.is_a_move:  # there, the denoiser takes z_t at T-1 for pure noise
            timesteps = timesteps.masked_fill(timesteps == len(alpha_bar) - 1, len(alpha_bar))
        shape = z_0.shape[1:]
        noise = torch.cat([keyed_noise(batch["source"], purpose, shape, seed=self.seed) for purpose in NOISE])
        return noised(z_0, noise, timesteps, alpha_bar)

    def _weights(self, count: int, step: int, device: torch.device) -> Tensors:
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

    def _restrict_labels(self, tensors: Tensors, is_pure: Tensor) -> Tensors:
        """The number of valid pixels of the task losses.

        Where z_t is made of labels, only samples whose z_t is pure noise count: the others' tells them.
        """
        counts = {}
        for name in LABELLED:
            valid = tensors[f"{name}_labels"] != IGNORE_INDEX
            if self.model.config.latent.is_of_labels:
                pure = of_domains(is_pure, [name])[:, None, None]
                valid, tensors[f"{name}_weights"] = valid & pure, tensors[f"{name}_weights"] * pure
            counts[f"task_{name}"] = valid.sum().float()
        return counts

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
        own = {"denoiser's average": self.teacher.module} if self.views.are_labelled_by_denoiser else {}
        return dict(self.model.named_children()) | super().parts() | own

    def models(self) -> dict[str, ICCLD]:
        teacher = copy.deepcopy(self.model)
        teacher.denoiser = self.teacher.module
        return {"teacher": teacher, "student": self.model}

    def frozen(self) -> list[nn.Module]:
        parts = [self.model.encoder, self.model.decoder, self.model.mask_encoder]
        return [part for part in parts if part is not None]

    def replicated(self) -> list[nn.Module]:
        return [self.module.discriminator]


def _check_labels(model: ICCLD, config: AdversarialConfig) -> None:
    uses_labels = config.task_weight > 0 or model.config.latent.is_of_labels
    if config.pseudo_labels is PseudoLabelSource.denoiser and not uses_labels:
        raise ValueError(
            f"stage2.objective.pseudo_labels={config.pseudo_labels.name} changes nothing with "
            f"model.latent={model.config.latent.name} and task_weight=0, as no loss is of labels; set "
            f"stage2.objective.task_weight above 0."
        )
    pure = config.deterministic or config.pure_noise_share > 0
    if config.task_weight and model.config.latent.is_of_labels and not pure:
        raise ValueError(
            f"stage2.objective.task_weight={config.task_weight} with model.latent={model.config.latent.name} counts "
            f"samples of pure noise alone (in all others z_t tells the labels); set stage2.objective.pure_noise_share "
            f"above 0."
        )
