"""The settings of stage 2's objective."""

from dataclasses import dataclass, field
from enum import Enum

from iccld.stages.denoising import DiffusionLoss
from iccld.uda.ema_profile import EmaProfileConfig
from iccld.uda.photometric import PhotometricConfig


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
    diffusion_loss: DiffusionLoss = DiffusionLoss.noise
    pure_noise_share: float = 0.0  # of the samples: z_t is pure noise, as the sampler starts, and the loss is on z_0
    deterministic: bool = False  # the control: z_t = 0 at the last timestep throughout, in inference too
    task_weight: float = 0.0  # cross entropy of D(z_0_pred, F) on source labels and mixed pseudo-labels
    confidence_threshold: float = 0.968  # of the pseudo-labels' weights, as in stage 1
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
        for name in ("task_weight", "adversarial_weight", "adversarial_ramp_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"stage2.objective.{name}={getattr(self, name)} must be 0 (off) or above.")
        for name in ("learning_rate", "discriminator_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"stage2.objective.{name}={getattr(self, name)} must be above 0.")
        for name in ("teacher_decay", "pure_noise_share", "confidence_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"stage2.objective.{name}={getattr(self, name)} must be between 0 and 1.")
