"""The settings of augmentation, corruption and averages. Nothing here needs torch."""

import math
from dataclasses import dataclass, field

from iccld.ranges import at_least, between, check_ranges, off_or_above


@dataclass
class PhotometricConfig:
    """Settings of colour jitter and blur; the defaults are DAFormer's."""

    jitter_probability: float = 0.8  # chance that an image's colours are jittered
    jitter: float = 0.2
    """The largest change of brightness, contrast and saturation, as a factor, and of hue, as a share of the circle."""
    blur_probability: float = 0.5  # chance that an image is blurred
    blur_sigma_min: float = 0.15  # smallest standard deviation of the blur, in pixels
    blur_sigma_max: float = 1.15  # largest standard deviation of the blur, in pixels

    def __post_init__(self) -> None:
        names = ("jitter_probability", "jitter", "blur_probability")
        check_ranges(self, "photometric", **dict.fromkeys(names, between(0, 1)))
        if not 0.0 < self.blur_sigma_min <= self.blur_sigma_max:
            raise ValueError(
                f"photometric.blur_sigma_min={self.blur_sigma_min} must be above 0 and at most "
                f"blur_sigma_max={self.blur_sigma_max}."
            )


@dataclass
class CorruptionConfig:
    """Settings of the corruption of labelled images towards the target.

    A sample draws how much it gets of each part, from nothing to the largest; blocks have a fixed share.
    """

    strength: float = 0.0  # in [0, 1], scales every part; 0 is off
    fourier_band: float = 0.1  # largest half width of the band that is the target's, as a share of the shorter side
    jitter: float = 0.4  # largest change of brightness, contrast, saturation and hue
    blur_sigma: float = 1.5  # largest standard deviation of the blur, in pixels; 0.15 is added
    noise: float = 0.1  # largest standard deviation of the sensor noise, in units of [0, 1]
    block: int = 16  # side of a grey block, in pixels
    block_ratio: float = 0.15  # share of the blocks that turns grey

    def __post_init__(self) -> None:
        off = "0 is off"
        check_ranges(
            self,
            "corruption",
            **dict.fromkeys(("strength", "jitter", "block_ratio"), between(0, 1, off)),
            fourier_band=between(0, 0.5, off),
            **dict.fromkeys(("blur_sigma", "noise"), off_or_above()),
            block=at_least(1, "16 pixels are usual"),
        )

    def photometric(self) -> PhotometricConfig:
        """Return the jitter and blur of this strength."""
        jitter, sigma = self.strength * self.jitter, self.strength * self.blur_sigma
        least = PhotometricConfig.blur_sigma_min
        return PhotometricConfig(jitter_probability=1.0, jitter=jitter, blur_sigma_max=least + sigma)


@dataclass
class EmaProfileConfig:
    """Settings of the averages that are kept beside the teacher, and of their snapshots. No widths: no averages."""

    widths: list[float] = field(default_factory=list)  # two, as [0.05, 0.10], span all others
    snapshot_every: int = 0  # steps between the snapshots that are written; 0: none

    def __post_init__(self) -> None:
        setting = f"ema_profile.widths={self.widths}"
        for width in self.widths:
            check_width(width, setting=setting)
        if len({average_name(width) for width in self.widths}) < len(self.widths):
            raise ValueError(f"{setting} must differ in their first three decimals; use [0.05, 0.10].")
        if self.snapshot_every < 0 or (self.snapshot_every > 0) != bool(self.widths):
            raise ValueError(
                f"ema_profile.snapshot_every={self.snapshot_every} with {setting} must be a positive number of steps "
                f"if there are widths, else 0; set both, or neither."
            )


MAX_WIDTH = 1 / math.sqrt(12)
"""The width of an average (`iccld.uda.ema_profile`) that is the plain mean of all steps."""


def check_width(width: float, *, setting: str) -> None:
    """Raise ValueError, which names `setting`, for a width outside of (0, 0.2886]."""
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(
            f"{setting} must be between 0 and 0.2886 (the plain mean of all steps); 0.05 and 0.10 are usual."
        )


def average_name(width: float) -> str:
    """Return the prefix of the names of an average's tensors, such as `ema_0.050`."""
    return f"ema_{width:.3f}"
