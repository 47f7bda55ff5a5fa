"""What trains in stage 2, and its losses: the denoiser, and the discriminator that it is trained against.

Both live in one module under one optimiser: the denoiser's term sees the discriminator with detached parameters, the
discriminator's term sees detached predictions, so one backward serves both.
"""

from torch import Tensor, nn
from torch.func import functional_call

from iccld.losses import domain_confusion, domain_cross_entropy, weighted_cross_entropy
from iccld.models.denoiser import DenoiserOutput
from iccld.models.discriminator import Discriminator
from iccld.models.iccld import ICCLD
from iccld.stages.base import StageInputs, StageOutput, pair
from iccld.stages.denoising import Noised, denoising_errors
from iccld.stages.domains import DOMAINS, of_domains
from iccld.stages.objective import AdversarialConfig, AdversaryInput

NUM_TIMESTEP_BINS = 4
Tensors = dict[str, Tensor]
LABELLED = ("source", "mixed")


class AdversarialModule(nn.Module):
    """What trains in stage 2: the denoiser and the discriminator."""

    alpha_bar: Tensor

    def __init__(self, model: ICCLD, discriminator: Discriminator, config: AdversarialConfig) -> None:
        super().__init__()
        assert model.denoiser is not None
        self.denoiser, self.discriminator, self.config = model.denoiser, discriminator, config
        self._whole = (model,)  # within a tuple it is no part: D stays out of what is trained, sharded and saved
        self.register_buffer("alpha_bar", model.alpha_bar.clone(), persistent=False)

    def forward(self, inputs: StageInputs) -> StageOutput:
        """Losses of the micro-batch; the three domains pass the denoiser together (no layer mixes samples)."""
        tensors, denominators = inputs
        given = Noised(*(tensors[name] for name in Noised._fields))
        prediction = self.denoiser(given.z_t, given.t, tensors["condition"])
        errors = denoising_errors(prediction, tensors["z_0"], given, self.alpha_bar, loss=self.config.diffusion_loss)
        losses = {"diffusion": (tensors["diffusion_weights"] * errors).sum() / denominators["diffusion"]}
        losses |= self._task_losses(prediction, tensors, denominators)
        seen = self._seen(prediction)
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        count = denominators["adversarial"]
        confusion = domain_confusion(functional_call(self.discriminator, frozen, (seen, given.t))).sum() / count
        losses["adversarial"] = tensors["adversarial_weight"] * confusion
        logits = self.discriminator(seen.detach(), given.t)
        losses["discriminator"] = domain_cross_entropy(logits, tensors["domains"]).sum() / count
        return StageOutput(losses, self._metrics(logits, tensors))

    def _task_losses(self, prediction: DenoiserOutput, tensors: Tensors, denominators: Tensors) -> Tensors:
        """Cross entropy of D(z_0_pred, F); the gradient passes D, whose weights stay."""
        if not self.config.task_weight:
            return {}
        logits = self._decode(prediction.z_0_pred, tensors, LABELLED).chunk(len(LABELLED))
        return {
            f"task_{name}": self.config.task_weight
            * weighted_cross_entropy(
                of_domain,
                tensors[f"{name}_labels"],
                weights=tensors[f"{name}_weights"],
                denominator=denominators[f"task_{name}"],
            )
            for name, of_domain in zip(LABELLED, logits, strict=True)
        }

    def _decode(self, z_0: Tensor, tensors: Tensors, names: tuple[str, ...]) -> Tensor:
        """D of a clean latent and the features of the view that the denoiser saw, at stride 4, for some domains."""
        (model,) = self._whole
        features = [tensors[name] for name in sorted(tensors) if name.startswith("features_")]
        return model.decoder(model.decodable(of_domains(z_0, names)), [of_domains(level, names) for level in features])

    def _seen(self, prediction: DenoiserOutput) -> Tensor:
        """What the discriminator sees."""
        if self.config.adversary_input is AdversaryInput.features:
            return prediction.middle
        if self.config.adversary_input is AdversaryInput.z0:
            return prediction.z_0_pred
        return prediction.noise_pred

    def _metrics(self, logits: Tensor, tensors: Tensors) -> Tensors:
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
