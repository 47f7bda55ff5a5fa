"""The trained module of stage 2, and its losses: the denoiser, and the discriminator that it is trained against.

Both live in one module under one optimiser: the denoiser's term sees the discriminator with detached parameters, the
discriminator's term sees detached predictions, so one backward serves both.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from iccld.losses import domain_confusion, domain_cross_entropy, weighted_cross_entropy
from iccld.models.denoiser import DenoiserOutput
from iccld.models.discriminator import Discriminator
from iccld.models.iccld import ICCLD
from iccld.stages.base import StageInputs, StageOutput, sum_and_count
from iccld.stages.denoising import Noised, denoising_errors
from iccld.stages.diagnostics import CLASSES
from iccld.stages.domains import LABELLED, encoded_of, of_domains
from iccld.stages.named import Tensors, tensors_to_condition, tensors_to_encoded
from iccld.stages.settings import DOMAINS, AdversarialConfig, AdversaryInput
from iccld.stages.view_cache import hit_metric

NUM_TIMESTEP_BINS = 4


class AdversarialModule(nn.Module):
    """Trained module of stage 2: the denoiser and the discriminator."""

    alpha_bar: Tensor

    def __init__(self, model: ICCLD, discriminator: Discriminator, config: AdversarialConfig) -> None:
        super().__init__()
        assert model.denoiser is not None
        self.denoiser, self.discriminator, self.config = model.denoiser, discriminator, config
        self._whole = (model,)  # a tuple hides it from nn.Module: D is neither trained, sharded nor saved
        self.register_buffer("alpha_bar", model.alpha_bar.clone(), persistent=False)

    def forward(self, inputs: StageInputs) -> StageOutput:
        """Compute the losses of a micro-batch; the denoiser takes all domains together (no layer mixes samples)."""
        tensors, denominators = inputs
        given = Noised(*(tensors[name] for name in Noised._fields))
        prediction = self.denoiser(given.z_t, given.t, tensors_to_condition(tensors))
        errors = denoising_errors(prediction, tensors["z_0"], given, self.alpha_bar, loss=self.config.diffusion_loss)
        losses = {"diffusion": (tensors["diffusion_weights"] * errors).sum() / denominators["diffusion"]}
        logits = self._decoded(prediction.z_0_pred, tensors)
        if self.config.task_weight:
            losses |= self._task_losses(logits, tensors, denominators)
        discriminator_input, domains, t = self._discriminator_input(prediction, logits), tensors["domains"], given.t
        if len(self.config.adversary_domains) < len(DOMAINS):
            domains, t = (of_domains(each, self.config.adversary_domains) for each in (domains, t))
        losses["adversarial"] = (
            tensors["adversarial_weight"] * self._confusion(discriminator_input, t) / denominators["adversarial"]
        )
        guesses = self.discriminator(discriminator_input.detach(), t)
        losses["discriminator"] = domain_cross_entropy(guesses, domains).sum() / denominators["discriminator"]
        classes = {CLASSES: tensors[CLASSES].float()} if CLASSES in tensors else {}
        return StageOutput(losses, classes | self._metrics(guesses, domains, t) | hit_metric(tensors))

    def _confusion(self, discriminator_input: Tensor, t: Tensor) -> Tensor:
        """Sum the confusion over the samples that the denoiser is to change; the discriminator is the current one."""
        detached = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        if not self.config.adversary_input.is_decoded:
            return domain_confusion(functional_call(self.discriminator, detached, (discriminator_input, t))).sum()
        of_target = functional_call(self.discriminator, detached, (discriminator_input.chunk(2)[1], t.chunk(2)[1]))
        source = torch.zeros_like(t.chunk(2)[1])
        return domain_cross_entropy(of_target, source).sum()

    def _task_losses(self, logits: Tensors, tensors: Tensors, denominators: Tensors) -> Tensors:
        """Compute the cross entropy of D(z_0_pred, F); the gradient passes D, whose weights stay."""
        losses = {}
        for name in LABELLED:
            labels, weights = tensors[f"{name}_labels"], tensors[f"{name}_weights"]
            count = denominators[f"task_{name}"]
            loss = weighted_cross_entropy(logits[name], labels, weights=weights, denominator=count)
            losses[f"task_{name}"] = self.config.task_weight * loss
        return losses

    def _decoded(self, z_0: Tensor, tensors: Tensors) -> Tensors:
        """Decode a clean latent by domain: D's logits at stride 4, with the features that the denoiser's view gave."""
        asked = {*(LABELLED if self.config.task_weight else ())}
        asked |= {*(self.config.adversary_domains if self.config.adversary_input.is_decoded else ())}
        if not asked:
            return {}
        (model,), names = self._whole, [name for name in DOMAINS if name in asked]
        seen = encoded_of(tensors_to_encoded(tensors, "seen"), names)
        logits = model.decoder(model.decodable(of_domains(z_0, names), seen.latent), seen.features)
        return dict(zip(names, logits.chunk(len(names)), strict=True))

    def _discriminator_input(self, prediction: DenoiserOutput, logits: Tensors) -> Tensor:
        """Return the input of the discriminator."""
        if self.config.adversary_input is AdversaryInput.map:
            return torch.cat([logits[name] for name in self.config.adversary_domains]).float().softmax(dim=1)
        inputs = {
            AdversaryInput.noise: prediction.noise_pred,
            AdversaryInput.z0: prediction.z_0_pred,
            AdversaryInput.features: prediction.middle,
        }
        return inputs[self.config.adversary_input]

    def _metrics(self, guesses: Tensor, domains: Tensor, t: Tensor) -> Tensors:
        """Measure the discriminator's accuracy per domain and timestep bin.

        An accuracy at chance means that it sees nothing; one near 1, that a mark gives the domains away.
        """
        right = (guesses.mean(dim=(2, 3)).argmax(dim=1) == domains).float()
        bins = t * NUM_TIMESTEP_BINS // len(self.alpha_bar)
        metrics = {}
        for i, domain in enumerate(self.config.adversary_domains):
            metrics[f"accuracy/{domain}"] = sum_and_count((right * (domains == i)).sum(), (domains == i).sum())
        for i in range(NUM_TIMESTEP_BINS):
            metrics[f"accuracy/t_bin_{i}"] = sum_and_count((right * (bins == i)).sum(), (bins == i).sum())
        return metrics
