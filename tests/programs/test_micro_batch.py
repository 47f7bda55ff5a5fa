"""Choosing among the divisors, and the setting itself."""

import pytest

from iccld.config import load_config, read_config, to_yaml
from iccld.programs.run.micro_batch import divisors, largest_by_climbing, largest_by_line, largest_by_trial


@pytest.mark.parametrize("count", [1, 2, 7, 12, 64, 96])
def test_bisection_finds_the_largest_that_fits_in_few_trials(count: int) -> None:
    sizes = divisors(count)
    assert all(count % size == 0 for size in sizes) and sizes[0] == 1 and sizes[-1] == count
    for bound in range(count + 2):
        tried: list[int] = []

        def fits(size: int, bound: int = bound, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= bound

        assert largest_by_trial(sizes, fits) == max((size for size in sizes if size <= bound), default=0)
        assert len(tried) == len(set(tried)) <= len(sizes).bit_length()


def test_the_line_ends_at_the_limit_and_never_below_one() -> None:
    sizes, peaks = divisors(24), {1: 100.0, 2: 110.0}
    assert largest_by_line(sizes, peaks, limit=170) == 8 == largest_by_line(sizes, peaks, limit=170.1)
    assert largest_by_line(sizes, peaks, limit=169.9) == 6
    assert largest_by_line(sizes, peaks, limit=50) == 1
    assert largest_by_line(sizes, {1: 100.0, 2: float("inf")}, limit=1e9) == 1
    assert largest_by_line(sizes, {1: 100.0, 2: 99.0}, limit=100) == 24, "noise is no gain"


@pytest.mark.parametrize("hidden", [0, 3, 200])
@pytest.mark.parametrize("fails_from", [1000, 12, 2])
@pytest.mark.parametrize("count", [1, 7, 24, 96])
def test_climbing_ends_on_a_size_that_was_tried_and_stays_within_the_limit(
    count: int, fails_from: int, hidden: int
) -> None:
    """Also where the peaks of small sizes hide in what libraries took before, and where memory ends below the limit."""
    sizes, limit = divisors(count), 100.0 + 30

    def peak(size: int) -> float:
        return float("inf") if size >= fails_from else 100.0 + max(size - hidden, 0)

    def fits(size: int) -> bool:
        assert size <= 2 * max(peaks) or size == min(s for s in sizes if s > max(peaks))
        peaks[size] = peak(size)
        return peaks[size] < float("inf")

    peaks = {1: peak(1)}
    found = largest_by_climbing(sizes, fits, peaks, reach=lambda: largest_by_line(sizes, peaks, limit=limit))
    assert found in peaks and peaks[found] <= limit
    assert found == max(size for size in sizes if peak(size) <= limit)


def test_auto_is_a_setting_like_a_number(tmp_path) -> None:
    config = load_config(["stage1.trainer.micro_batch_size=auto", "stage2.trainer.micro_batch_size=3"])
    assert config.stage1.trainer.micro_batch_size == "auto" and config.stage2.trainer.micro_batch_size == 3
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_config(path) == config
    assert config.stage1.trainer.layout(world_size=4).num_accumulation == 1, "the ranks can share the batch"
    with pytest.raises(ValueError, match="global_batch_size=4 must be a multiple of micro_batch_size=1 x 3 ranks"):
        config.stage1.trainer.layout(world_size=3)


@pytest.mark.parametrize("value", ["0", "-1", "largest", "2.5", "true", "'4'", "null", "[1]"])
def test_another_word_is_refused_in_one_line(value: str) -> None:
    with pytest.raises(ValueError, match=r"micro_batch_size|Union") as refused:
        load_config([f"stage1.trainer.micro_batch_size={value}"])
    assert "\n" not in str(refused.value)
