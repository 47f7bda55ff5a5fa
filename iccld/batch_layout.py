"""Division of the global batch of a step among ranks and micro-batches."""

from dataclasses import dataclass

AUTO = "auto"
"""The micro-batch size that leaves the choice to what fits in memory."""


@dataclass(frozen=True)
class BatchLayout:
    """Division of a step's samples, made once from three numbers and used by stream, engine and metrics.

    The meaning of a sample number does not depend on it. Raises ValueError if the global batch cannot be divided so.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        divisor = self.micro_batch_size * self.world_size
        if self.global_batch_size < 1 or self.global_batch_size % divisor:
            raise ValueError(
                f"trainer.global_batch_size={self.global_batch_size} must be a multiple of micro_batch_size="
                f"{self.micro_batch_size} x {self.world_size} ranks; use a multiple of {divisor}, or a smaller "
                f"micro-batch."
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be in 0-{self.world_size - 1}; world_size is {self.world_size}.")

    @property
    def rank_batch_size(self) -> int:
        """Number of samples of a rank in a step."""
        return self.global_batch_size // self.world_size

    @property
    def num_accumulation(self) -> int:
        """Number of micro-batches of a rank in a step."""
        return self.rank_batch_size // self.micro_batch_size

    def numbers(self, step: int, accumulation: int) -> range:
        """Return the sample numbers, of each stream, of one micro-batch of this rank."""
        start = step * self.global_batch_size
        start += (accumulation * self.world_size + self.rank) * self.micro_batch_size
        return range(start, start + self.micro_batch_size)
