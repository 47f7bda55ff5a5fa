"""The settings of stage 2's objective."""

import math
from dataclasses import dataclass, field
from enum import Enum

from iccld.ranges import above, between, check_ranges, off_or_above
from iccld.stages.denoising import DiffusionLoss
from iccld.stages.domains import DOMAINS
from iccld.uda.corruption import CorruptionConfig
from iccld.uda.ema_profile import EmaProfileConfig
from iccld.uda.photometric import PhotometricConfig


class AdversaryInput(Enum):
    """Inputs of the discriminator: predicted noise (the paper), the clean latent it implies, or the UNet's middle.

    `map`: softmax of D(z_0_pred, F), of source and target alone, and only the target's term moves the denoiser: towards
    what the discriminator takes for the source.
    """

    noise = "noise"
    z0 = "z0"
    features = "features"
    map = "map"


class PseudoLabelSource(Enum):
    """Sources of the target's labels: E and D of stage 1, or their mean with one step of the denoiser's EMA."""

    stage1 = "stage1"
    denoiser = "denoiser"


@dataclass
class AdversarialConfig:
    """Settings of stage 2's objective, by default the paper's; an option of weight 0 is off."""

    learning_rate: float = 1e-4  # the denoiser's
    weight_decay: float = 0.05  # AdamW's
    discriminator_learning_rate: float = 1e-4  # the discriminator's
    teacher_decay: float = 0.999  # decay of the teacher's moving average, once it is warm
    diffusion_loss: DiffusionLoss = DiffusionLoss.noise
    pure_noise_share: float = 0.0  # share of samples whose z_t is pure noise, as in sampling; their loss is on z_0
    deterministic: bool = False  # the control: z_t = 0 at the last timestep throughout, in inference too
    task_weight: float = 0.0  # weight of D(z_0_pred, F)'s cross entropy on source labels and mixed pseudo-labels
    pseudo_labels: PseudoLabelSource = PseudoLabelSource.stage1
    flip_teacher: bool = False  # pseudo-labels from the mean with the mirrored image's prediction
    confidence_threshold: float = 0.968  # pixels above it count for the image weight q
    class_thresholds: float = 0.0  # share of a class's mean confidence that a pixel must reach; 0: all weigh q
    class_balance: float = 0.0  # exponent of the balance of classes in the pseudo-labels' weights
    adversarial_weight: float = 1e-3  # weight of the denoiser's adversarial loss; 0: off
    adversarial_ramp_steps: int = 1000  # steps over which that weight grows from 0
    adversary_input: AdversaryInput = AdversaryInput.noise
    domain_weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    """Weights of the diffusion loss on source, target and mixed images; 0 leaves one out."""
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    corruption: CorruptionConfig = field(
        default_factory=CorruptionConfig
    )  # corrupts the view of source and mixed images
    ema_profile: EmaProfileConfig = field(default_factory=EmaProfileConfig)

    @property
    def decodes(self) -> bool:
        """Tell whether a loss passes D."""
        return self.task_weight > 0 or self.adversary_input is AdversaryInput.map

    @property
    def adversary_domains(self) -> tuple[str, ...]:
        """Return the domains that the discriminator tells apart."""
        return ("source", "target") if self.adversary_input is AdversaryInput.map else DOMAINS

    @property
    def moved_domains(self) -> tuple[str, ...]:
        """Return those of them whose samples the adversarial term moves."""
        return ("target",) if self.adversary_input is AdversaryInput.map else DOMAINS

    def __post_init__(self) -> None:
        weights = self.domain_weights
        if len(weights) != 3 or not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
            raise ValueError(
                f"stage2.objective.domain_weights={self.domain_weights} must be three weights >= 0 "
                f"(source, target, mixed), not all 0."
            )
        weights = ("task_weight", "adversarial_weight", "adversarial_ramp_steps", "weight_decay")
        shares = ("teacher_decay", "pure_noise_share", "confidence_threshold", "class_thresholds", "class_balance")
        check_ranges(
            self,
            "stage2.objective",
            **dict.fromkeys(weights, off_or_above()),
            **dict.fromkeys(("learning_rate", "discriminator_learning_rate"), above(0)),
            **dict.fromkeys(shares, between(0, 1)),
        )
