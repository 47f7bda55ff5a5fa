"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from dataclasses import dataclass


@dataclass
class ScheduleConfig:
    """DAFormer's schedule: linear warm-up from `warmup_ratio`, times a linear decay to `final_ratio`."""

    warmup_steps: int = 1500  # steps until the full learning rate; 0: no warm-up
    warmup_ratio: float = 1e-6  # the share of the learning rate that the warm-up begins with
    final_ratio: float = 0.0  # the share of it that is left after the last step

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"trainer.schedule.warmup_steps={self.warmup_steps} must be 0 (off) or above.")
        for name in ("warmup_ratio", "final_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"trainer.schedule.{name}={getattr(self, name)} must be between 0 and 1.")


def learning_rate_factor(step: int, *, num_steps: int, config: ScheduleConfig) -> float:
    """What the base learning rates are multiplied with in 0-based step `step` of `num_steps`."""
    factor = 1.0 - (1.0 - config.final_ratio) * step / num_steps
    if step < config.warmup_steps:
        factor *= 1.0 - (1.0 - step / config.warmup_steps) * (1.0 - config.warmup_ratio)
    return factor
