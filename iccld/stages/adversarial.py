"""Stage 2: the denoiser learns to denoise so that a discriminator cannot tell the domains apart. E and D are frozen.

The paper (`stage2=paper`): L2 = ||noise_pred - noise||^2 + lambda_adv * L_adv(discriminator(noise_pred, t)). By default
the squared error is the velocity's, and D's cross entropy on the predicted latent is added (docs/method.md).
`C h w` latent, `T` diffusion steps; domains are ordered source, target, mixed.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iccld.labels import IGNORE_INDEX
from iccld.models.attention import check_backend
from iccld.models.discriminator import Discriminator
from iccld.models.iccld import ICCLD
from iccld.models.model_card import ModelStage
from iccld.models.settings import DiscriminatorConfig
from iccld.stages.adversarial_module import AdversarialModule
from iccld.stages.base import Stage, StageInputs, decayed_groups, keyed_noise
from iccld.stages.denoising import Noised, draw_timesteps, noised, without_noise
from iccld.stages.domains import LABELLED, of_domains
from iccld.stages.kind import Score, StageKind, StageSettings
from iccld.stages.named import Tensors
from iccld.stages.settings import (
    DOMAINS,
    AdversarialConfig,
    AdversaryInput,
    InferenceConfig,
    PseudoLabelSource,
    Stage2Config,
    ViewCacheConfig,
)
from iccld.stages.signs import Sign, remedies_of_lost_classes, signs_of_discriminator
from iccld.stages.views import CORRUPTION_NOISE, LABEL_NOISE, Views
from iccld.uda.teacher import Teacher

DIFFUSION_NOISE = tuple(f"noise {domain}" for domain in DOMAINS)
"""The purposes of the noise in z_t, one a domain; that of all three is keyed by the source's numbers."""


def noise_shapes(
    config: AdversarialConfig, *, latent: Sequence[int], crop_size: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes, by purpose, of the noise that a step draws for each sample."""
    shapes: dict[str, tuple[int, ...]] = {}
    if not config.deterministic:
        shapes |= dict.fromkeys(DIFFUSION_NOISE, tuple(latent))
        if config.pseudo_labels is PseudoLabelSource.denoiser:
            shapes |= dict.fromkeys(LABEL_NOISE[: 1 + config.flip_teacher], tuple(latent))
    if config.corruption.strength:
        shapes[CORRUPTION_NOISE] = (3, *crop_size)
    return shapes


def new_discriminator(model: ICCLD, objective: AdversarialConfig, config: DiscriminatorConfig) -> Discriminator:
    """Make a discriminator for what the objective shows it."""
    assert model.denoiser is not None
    channels = {AdversaryInput.features: model.denoiser.middle_channels, AdversaryInput.map: model.num_classes}
    in_channels = channels.get(objective.adversary_input, model.config.latent_channels)
    return Discriminator(config=config, in_channels=in_channels, num_domains=len(objective.adversary_domains))


class AdversarialStage(Stage):
    """Stage 2 of the method. `model` brings E, D and the latent's statistics from stage 1."""

    name = "stage2"
    module: AdversarialModule

    def __init__(self, model: ICCLD, discriminator: Discriminator, config: AdversarialConfig, *, seed: int) -> None:
        _check_labels(model, config)
        self.model, self.config, self.seed = model, config, seed
        model.stage, model.deterministic = ModelStage.adversarial, config.deterministic
        for part in self.called_by_prepare():
            part.requires_grad_(False).eval()
        self.views = Views(model, config, seed)
        self.module = AdversarialModule(model, discriminator, config)
        self.student, self.ema_profile = self.module.denoiser, config.ema_profile
        self.teacher = Teacher(self.student, max_decay=config.teacher_decay)

    def prepare(self, batch: Mapping[str, Any], step: int) -> StageInputs:
        tensors = self.views(batch) if self.view_cache is None else self.view_cache(batch, self.views)
        if self.views.are_labelled_by_denoiser:
            tensors = self.views.with_denoiser_labels(batch, tensors, self.teacher.module)
        z_0 = tensors["z_0"]
        count, given = len(z_0) // len(DOMAINS), self._noised(batch, z_0)
        tensors |= given._asdict() | self._weights(count, step, z_0.device)
        denominators = {"diffusion": tensors["diffusion_weights"].sum()}
        domains_of_loss = {"adversarial": self.config.moved_domains, "discriminator": self.config.adversary_domains}
        for name, domains in domains_of_loss.items():
            denominators[name] = torch.full((), float(count * len(domains)), device=z_0.device)
        if self.config.task_weight:
            denominators |= self._leave_out_leaked_labels(tensors, given.is_pure)
        return StageInputs(tensors, denominators)

    def pseudo_labels_of(self, batch: Mapping[str, Any]) -> Tensor | None:
        return self.views.pseudo_labels_of(batch, self.teacher.module)

    def _noised(self, batch: Mapping[str, Any], z_0: Tensor) -> Noised:
        numbers, alpha_bar, share = batch["source"]["numbers"], self.model.alpha_bar, self.config.pure_noise_share
        if self.config.deterministic:
            return without_noise(z_0, alpha_bar)
        draws, pure = (
            torch.cat([self.views.uniform(1, f"{purpose} {domain}", numbers)[:, 0] for domain in DOMAINS])
            for purpose in ("timestep", "pure noise")
        )
        timesteps = draw_timesteps(draws, pure, pure_noise_share=share, num_train_steps=len(alpha_bar))
        if self.model.config.latent.is_a_move:  # the denoiser then takes z_t at T-1 for pure noise
            timesteps = timesteps.masked_fill(timesteps == len(alpha_bar) - 1, len(alpha_bar))
        shape = z_0.shape[1:]
        noise = torch.cat([keyed_noise(batch["source"], purpose, shape, seed=self.seed) for purpose in DIFFUSION_NOISE])
        return noised(z_0, noise, timesteps, alpha_bar)

    def _weights(self, count: int, step: int, device: torch.device) -> Tensors:
        """Return each sample's domain and its weights in the losses; `count` samples a domain.

        They are filled on the device: a tensor made from the host's numbers is a copy that the host waits for.
        """
        config = self.config
        ramp = min(1.0, (step + 1) / max(1, config.adversarial_ramp_steps))
        return {
            "domains": torch.arange(len(DOMAINS), device=device).repeat_interleave(count),
            "diffusion_weights": torch.cat([torch.full((count,), w, device=device) for w in config.domain_weights]),
            "adversarial_weight": torch.full((), ramp * config.adversarial_weight, device=device),
        }

    def _leave_out_leaked_labels(self, tensors: Tensors, is_pure: Tensor) -> Tensors:
        """Set the weights of labels that z_t gives away to 0; return the number of valid pixels of each task loss.

        If z_t is made of labels, only samples whose z_t is pure noise count: the z_t of the others gives their labels
        away.
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
        options = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay, "name": "denoiser"}
        return [
            *decayed_groups(module.denoiser.named_parameters(), **options),
            {
                "name": "discriminator",
                "params": list(module.discriminator.parameters()),
                "lr": config.discriminator_learning_rate,
                "betas": (0.9, 0.99),
                "weight_decay": 0.0,
            },
        ]

    def parts(self) -> dict[str, nn.Module]:
        own = {"denoiser's average": self.teacher.module} if self.views.are_labelled_by_denoiser else {}
        return dict(self.model.named_children()) | super().parts() | own

    def assemble_models(self) -> dict[str, ICCLD]:
        teacher = copy.deepcopy(self.model)
        teacher.denoiser = self.teacher.module
        return {"teacher": teacher, "student": self.model}

    def called_by_prepare(self) -> list[nn.Module]:
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


class Adversarial(StageKind[Stage2Config]):
    """Stage 2 as the programs see it."""

    name, previous = "stage2", "stage1"
    saved_as = ModelStage.adversarial
    free_settings = ("cache.folder", "cache.max_gib")
    settings_of_it_alone = (
        "model.denoiser.", "model.discriminator.", "model.condition", "model.residual_", "num_steps:", "noise_seeds:",
        "num_averaged:", "blend:", "solver:", "start:",
    )  # fmt: skip
    settings_of_no_view = (
        "stage1_from", "initial_model", "statistics_samples", "stage2.trainer.", "stage2.cache.",
        "model.denoiser.", "model.discriminator.", *(
            f"stage2.objective.{name}"
            for name in (
                "learning_rate", "weight_decay", "discriminator_learning_rate", "teacher_decay", "diffusion_loss",
                "pure_noise_share", "deterministic", "adversarial_weight", "adversarial_ramp_steps", "domain_weights",
                "ema_profile.",
            )
        ),
    )  # fmt: skip

    def build(
        self, settings: StageSettings[Stage2Config], previous: ICCLD | None, *, device: torch.device
    ) -> AdversarialStage:
        model = settings.new_model(with_denoiser=False) if previous is None else previous
        objective = settings.own.objective
        model.start_denoiser(settings.model)
        discriminator = new_discriminator(model, objective, settings.model.discriminator)
        return AdversarialStage(model.to(device), discriminator.to(device), objective, seed=settings.seed)

    def check(self, settings: StageSettings[Stage2Config], *, device: torch.device, is_sharded: bool) -> None:
        check_backend(settings.model.denoiser.attention, device.type)

    def noise(self, settings: StageSettings[Stage2Config]) -> dict[str, tuple[int, ...]]:
        drawn = noise_shapes(settings.own.objective, latent=settings.latent_shape, crop_size=settings.crop_size)
        if settings.own.cache.num_samples:  # a view that repeats has the noise of another number
            drawn.pop(CORRUPTION_NOISE, None)
        return drawn

    def cache(self, settings: StageSettings[Stage2Config]) -> ViewCacheConfig:
        return settings.own.cache

    def averaged(self, model: ICCLD) -> nn.Module:
        assert model.denoiser is not None
        return model.denoiser

    def num_steps(self, inference: InferenceConfig) -> list[int]:
        return inference.num_steps

    def scores(self, model: ICCLD, inference: InferenceConfig, *, seed: int, score: Score) -> dict[str, Any]:
        """Score by the number of steps; the mean latent is a control: denoising must be worth more than it."""
        by_steps: dict[str, Any] = {}
        for num_steps in self.num_steps(inference):
            denoised = next((scores for steps, scores in by_steps.items() if steps != "0"), None)
            if model.deterministic and num_steps and denoised:  # neither steps nor seeds change anything
                by_steps[str(num_steps)] = denoised
                continue
            seeds = range(1 if model.deterministic else inference.noise_seeds)
            options = {"seed": seed, "num_steps": num_steps}
            by_steps[str(num_steps)] = score([self.predictor(model, inference, noise_seed=i, **options) for i in seeds])
        mean_latent = score([lambda images, _: model.segment_mean_latent(images)])
        return {self.name: by_steps, f"{self.name}_mean_latent": mean_latent}

    def main_score(self, inference: InferenceConfig) -> str:
        return f"{self.name} x{self.shown_steps(inference)}"

    def signs(self, recent: Sequence[Mapping[str, Any]], settings: StageSettings[Stage2Config]) -> list[Sign]:
        objective = settings.own.objective
        if not objective.adversarial_weight:
            return []
        return signs_of_discriminator(recent, is_ramped=recent[0]["step"] >= objective.adversarial_ramp_steps)

    def class_remedies(self, settings: StageSettings[Stage2Config]) -> list[str]:
        return remedies_of_lost_classes(self.name, settings.own.objective)
