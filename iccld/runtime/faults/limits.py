"""Limits of how long a rank may be without progress before the watchdog ends it."""

from dataclasses import dataclass

from iccld.ranges import above, check_ranges

WATCHED_BEATS = 5  # before its limit, a rank begins to read the others' heartbeats


@dataclass
class WatchdogConfig:
    """Settings: seconds without progress after which a rank is ended, by its phase.

    The limits of collectives are longer than those of the phases, so that the watchdog speaks first.
    """

    enabled: bool = True  # false: nothing ends a rank that hangs
    beat_s: float = 5.0  # between two signs of life that a rank writes
    preflight_s: float = 180.0  # limit of the checks before a run
    start_s: float = 1800.0
    """Limit until the first step of a stage is done (weights are fetched, code compiled), and after its last."""
    step_s: float = 600.0  # limit of every phase of later steps
    save_s: float = 1800.0  # limit of a save
    evaluate_s: float = 1800.0  # limit of scoring one image
    collective_s: float = 3600.0  # limit of a collective outside of the later steps
    collective_step_s: float = 900.0  # limit of a collective in a later step

    def __post_init__(self) -> None:
        seconds = [name for name in vars(self) if name.endswith("_s")]
        check_ranges(self, "watchdog", **dict.fromkeys(seconds, above(0, "enabled=false switches it off")))
        longest = max(self.start_s, self.save_s, self.evaluate_s)
        for name, limit in (("collective_step_s", self.step_s), ("collective_s", max(longest, self.step_s))):
            if getattr(self, name) <= limit:
                raise ValueError(
                    f"watchdog.{name}={getattr(self, name)} must be above {limit}, the limit of what it is for, so "
                    f"that the watchdog, which can name the rank, is first; use {1.5 * limit:g}."
                )
        least = (WATCHED_BEATS + 1) * self.beat_s
        if min(self.step_s, self.start_s, self.save_s, self.evaluate_s) < least:
            raise ValueError(
                f"watchdog.beat_s={self.beat_s} leaves too few beats within the shortest limit; use limits of at "
                f"least {least:g} s, or a shorter beat."
            )

    def limit(self, phase: str, *, is_first: bool) -> float:
        """Return the limit of a phase; `is_first`: the first step of a stage is not done."""
        own = {"preflight": self.preflight_s, "save": self.save_s, "evaluate": self.evaluate_s}
        own |= {"start": self.start_s, "finish": self.start_s}
        return own.get(phase, self.start_s if is_first else self.step_s)
