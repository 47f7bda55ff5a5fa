"""The watchdog's limits, and those that cannot work."""

import pytest

from iccld.runtime.settings import WatchdogConfig


def test_limits_by_phase() -> None:
    config = WatchdogConfig()
    assert config.limit("data", is_first=True) == config.limit("start", is_first=False) == config.start_s
    assert config.limit("data", is_first=False) == config.limit("agree", is_first=False) == config.step_s
    assert config.limit("save", is_first=True) == config.save_s


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"step_s": 0.0}, r"watchdog.step_s=0.0 must be above 0, and finite; enabled=false"),
        ({"step_s": 900.0}, r"watchdog.collective_step_s=900.0 must be above 900.0, .* use 1350"),
        ({"save_s": 7200.0}, r"watchdog.collective_s=3600.0 must be above 7200.0"),
        ({"beat_s": 120.0}, r"watchdog.beat_s=120.0 leaves too few beats .* at least 720 s"),
        ({"start_s": float("nan")}, r"watchdog.start_s=nan"),
    ],
)
def test_limits_that_cannot_work_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WatchdogConfig(**settings)  # type: ignore[arg-type]
