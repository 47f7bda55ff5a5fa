"""How a rank's part of the global batch is split into micro-batches, and which is the largest that memory permits."""

from collections.abc import Callable, Mapping, Sequence

AUTO = "auto"


def check_micro_batch_size(size: int | str) -> None:
    if size != AUTO and not (isinstance(size, int) and size >= 1):
        raise ValueError(f"trainer.micro_batch_size={size} must be a number of samples, at least 1, or auto.")


def num_accumulation(global_batch_size: int, *, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches a rank and step. Raises ValueError where the global batch cannot be divided so."""
    divisor = micro_batch_size * world_size
    if global_batch_size % divisor:
        raise ValueError(
            f"trainer.global_batch_size={global_batch_size} must be a multiple of micro_batch_size="
            f"{micro_batch_size} x {world_size} ranks; use a multiple of {divisor}, or a smaller micro-batch."
        )
    return global_batch_size // divisor


def divisors(count: int) -> list[int]:
    """Smallest first."""
    return [size for size in range(1, count + 1) if count % size == 0]


def largest_by_trial(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """By bisection of ascending sizes, of which none fits beyond the first that does not; 0 where none fits."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else 0


def largest_by_line(sizes: Sequence[int], peaks: Mapping[int, float], *, limit: float) -> int:
    """Where the peak grows by a line through those of 1 and 2 samples; never less than 1, whose peak was borne."""
    slope = max(peaks[2] - peaks[1], 0.0)
    return max(size for size in sizes if size == 1 or peaks[1] + (size - 1) * slope <= limit)
