"""The settings of the stages, and of how their models predict. Nothing here needs torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from iccld.ranges import above, at_least, between, check_ranges, off_or_above
from iccld.settings import TrainerConfig
from iccld.solver import Solver
from iccld.uda.settings import CorruptionConfig, EmaProfileConfig, PhotometricConfig


@dataclass
class SegmentationConfig:
    """Settings of stage 1's objective, by default the constants of DAFormer and MIC; an option of weight 0 is off."""

    adapt: bool = True  # False: source only
    encoder_learning_rate: float = 6e-5  # the backbone's
    decoder_learning_rate: float = 6e-4  # that of all other trained weights
    weight_decay: float = 0.01  # AdamW's
    teacher_decay: float = 0.999  # decay of the teacher's moving average, once it is warm
    use_teacher: bool = True  # False: the student's own pseudo-labels (an ablation of the paper)
    flip_teacher: bool = False  # pseudo-labels from the mean of the image's prediction and the mirrored image's
    confidence_threshold: float = 0.968  # pixels that reach it count for the image weight q
    class_thresholds: float = 0.0
    """Threshold of the class that the teacher is surest of, lower for the others; 0: off, all pixels weigh q. 0.95 is
    usual.
    """
    image_weight: bool = False  # with class_thresholds, pixels that reach their threshold weigh q, not 1
    class_balance: float = 0.0  # exponent of the balance of classes in the pseudo-labels' weights; 0.5: square root
    warm_start_steps: int = 0  # source only for so many steps, so that the first pseudo-labels are worth something
    target_weight: float = 1.0  # weight of the loss on mixed images
    target_labels: bool = False  # an upper bound: the target's true labels in place of pseudo-labels
    masked_weight: float = 0.0  # weight of the loss on masked target images; 0: off
    masked_block: int = 64  # side of a masked block, in pixels
    masked_ratio: float = 0.7  # share of the blocks that is masked
    feature_distance_weight: float = 0.0  # weight of the distance to the pretrained features; 0: off
    feature_distance_classes: list[int] = field(default_factory=lambda: [6, 7, 11, 12, 13, 14, 15, 16, 17, 18])
    """Indices of the classes that the distance is taken over; of own or merged classes, the default is the things."""
    mask_latent_weight: float = 1.0  # weight of the labels' reconstruction, if the latent is the mask's
    mask_latent_drop: float = 0.5  # share of samples whose inter-coder connection is dropped in the reconstruction
    mask_latent_noise: float = 0.5  # standard deviation of the noise on the latent in the reconstruction
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)  # of source and mixed images
    corruption_start: int = 0  # corruption begins at this step: it slows down a network that has learnt little yet
    ema_profile: EmaProfileConfig = field(default_factory=EmaProfileConfig)

    def __post_init__(self) -> None:
        shares = ("teacher_decay", "confidence_threshold", "class_thresholds", "class_balance", "masked_ratio")
        weights = ("weight_decay", "target_weight", "masked_weight", "feature_distance_weight", "mask_latent_weight")
        check_ranges(
            self,
            "stage1.objective",
            **dict.fromkeys((*shares, "mask_latent_drop"), between(0, 1)),
            **dict.fromkeys(("encoder_learning_rate", "decoder_learning_rate", "masked_block"), above(0)),
            **dict.fromkeys(("corruption_start", "warm_start_steps", "mask_latent_noise", *weights), off_or_above()),
        )


DOMAINS: tuple[str, ...] = ("source", "target", "mixed")
"""The domains of stage 2, in their order along the batch; here, because settings name them and need no torch."""


class DiffusionLoss(Enum):
    """Errors to minimise, squared: the noise's (the paper), or the velocity's, which weighs noisy timesteps more.

    The noise's error is alpha_bar_t times the velocity's: timesteps above 800 have 1 % of its weight, while sampling in
    one step asks for timestep T-1 alone.
    """

    noise = "noise"
    velocity = "velocity"


class AdversaryInput(Enum):
    """Inputs of the discriminator: predicted noise (the paper), the clean latent it implies, or the UNet's middle.

    `map`: softmax of D(z_0_pred, F), of source and target alone, and only the target's term moves the denoiser: towards
    what the discriminator takes for the source.
    """

    noise = "noise"
    z0 = "z0"
    features = "features"
    map = "map"

    @property
    def is_decoded(self) -> bool:
        """Tell whether the input is made of D's maps, which the source and the target have."""
        return self is AdversaryInput.map


class PseudoLabelSource(Enum):
    """Sources of the target's labels: E and D of stage 1, or their mean with one step of the denoiser's EMA."""

    stage1 = "stage1"
    denoiser = "denoiser"


@dataclass
class AdversarialConfig:
    """Settings of stage 2's objective; `stage2=paper` has the paper's. An option of weight 0 is off."""

    learning_rate: float = 1e-4  # the denoiser's
    weight_decay: float = 0.05  # AdamW's
    discriminator_learning_rate: float = 1e-4  # the discriminator's
    teacher_decay: float = 0.999  # decay of the teacher's moving average, once it is warm
    diffusion_loss: DiffusionLoss = field(default=DiffusionLoss.velocity, metadata={"when_absent": "noise"})
    pure_noise_share: float = field(default=0.5, metadata={"when_absent": 0.0})
    """Share of samples whose z_t is pure noise, as in sampling; their loss is on z_0."""
    deterministic: bool = False  # the control: z_t = 0 at the last timestep throughout, in inference too
    task_weight: float = field(default=10.0, metadata={"when_absent": 0.0})
    """Weight of D(z_0_pred, F)'s cross entropy on source labels and mixed pseudo-labels."""
    pseudo_labels: PseudoLabelSource = PseudoLabelSource.stage1
    flip_teacher: bool = False  # pseudo-labels from the mean with the mirrored image's prediction
    confidence_threshold: float = 0.968  # pixels that reach it count for the image weight q
    class_thresholds: float = 0.0
    """Threshold of the class that the labels are surest of, lower for the others; 0: off, all pixels weigh q."""
    class_balance: float = 0.0  # exponent of the balance of classes in the pseudo-labels' weights
    adversarial_weight: float = 1e-3  # weight of the denoiser's adversarial loss; 0: the discriminator trains alone
    adversarial_ramp_steps: int = 1000  # steps over which that weight grows from 0
    adversary_input: AdversaryInput = AdversaryInput.noise
    domain_weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    """Weights of the diffusion loss on source, target and mixed images; 0 leaves one out."""
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    corruption: CorruptionConfig = field(
        default_factory=lambda: CorruptionConfig(strength=0.5), metadata={"when_absent": {"strength": 0.0}}
    )
    """Corruption of the view of source and mixed images."""
    ema_profile: EmaProfileConfig = field(default_factory=EmaProfileConfig)

    @property
    def decodes(self) -> bool:
        """Tell whether a loss passes D."""
        return self.task_weight > 0 or self.adversary_input.is_decoded

    @property
    def adversary_domains(self) -> tuple[str, ...]:
        """Return the domains that the discriminator tells apart."""
        return ("source", "target") if self.adversary_input.is_decoded else DOMAINS

    @property
    def moved_domains(self) -> tuple[str, ...]:
        """Return those of them whose samples the adversarial term moves."""
        return ("target",) if self.adversary_input.is_decoded else DOMAINS

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


@dataclass
class ViewCacheConfig:
    """Settings of the cache of stage 2's views. FLOPs and MFU count E and D as if they ran in every step."""

    num_samples: int = 0  # samples of each domain, seen again and again; 0: no cache, every sample is new
    folder: str = ""  # on the node's disk or in its memory, shared by its ranks and by runs of equal views
    max_gib: float = 20.0  # the most that the folder may take; what does not fit is computed each time

    def __post_init__(self) -> None:
        off = "num_samples=0 turns the cache off"
        check_ranges(self, "stage2.cache", num_samples=off_or_above(), max_gib=above(0, off))
        if self.num_samples and not self.folder:
            raise ValueError(
                f"stage2.cache.num_samples={self.num_samples} needs stage2.cache.folder, a folder of this node's disk "
                f"or memory (/dev/shm/...); set it, or num_samples=0 for no cache."
            )


@dataclass
class Stage1Config:
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    objective: SegmentationConfig = field(default_factory=SegmentationConfig)


@dataclass
class Stage2Config:
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(gradient_clip=1.0))
    objective: AdversarialConfig = field(default_factory=AdversarialConfig)
    cache: ViewCacheConfig = field(default_factory=ViewCacheConfig)

    def __post_init__(self) -> None:
        num_samples, batch = self.cache.num_samples, self.trainer.global_batch_size
        if num_samples % batch:
            raise ValueError(
                f"stage2.cache.num_samples={num_samples} must be a multiple of stage2.trainer.global_batch_size="
                f"{batch}; use {-(-num_samples // batch) * batch}."
            )


class Weights(Enum):
    """The models that a stage leaves, and the teacher that scored best in training (`evaluate_every`)."""

    teacher = "teacher"
    student = "student"
    best = "best"


@dataclass
class InferenceConfig:
    """Settings of prediction: which weights, and how many denoising steps (0: the decoder alone, as after stage 1)."""

    weights: Weights = Weights.teacher  # which model predicts; best: the teacher that scored best in training
    num_steps: list[int] = field(default_factory=lambda: [1, 4])
    """Numbers of denoising steps, each scored; 0, beside others: the decoder alone."""
    solver: Solver = Solver.ddim  # how the steps follow the denoiser
    start: float = 1.0  # where denoising begins: 1 is pure noise, 0.5 half-way, from E's latent with noise
    noise_seeds: int = 1  # each is scored on its own
    num_averaged: int = 1  # denoised from so many noises, whose class probabilities are averaged
    blend: float = 0.0  # share of D(E(x))'s probabilities, as after stage 1, in the denoised ones

    def __post_init__(self) -> None:
        if not self.num_steps or min(self.num_steps) < 0 or max(self.num_steps) > 1000:
            raise ValueError(f"inference.num_steps={self.num_steps} must be numbers of denoising steps, 0 to 1000.")
        check_ranges(self, "inference", noise_seeds=at_least(1), num_averaged=at_least(1))
        if not 0.0 <= self.blend <= 1.0:
            raise ValueError(f"inference.blend={self.blend} must be between 0 (off) and 1 (stage 1's map alone).")

        if not 0.0 < self.start <= 1.0:
            raise ValueError(f"inference.start={self.start} must be above 0, and at most 1 (pure noise).")

    def refuse_no_denoising(self, stages: Sequence[str]) -> None:
        """Refuse numbers of steps among which none denoises, if stage 2 is among the stages. Raises ValueError.

        Saved settings of earlier versions may hold them: only what is asked for now is refused.
        """
        if "stage2" in stages and not any(self.num_steps):
            raise ValueError(
                f"inference.num_steps={self.num_steps} would score stage 2 by the decoder alone, as stage 1 is scored; "
                f"give a number of denoising steps, as [1], or [1,0] to see both."
            )
