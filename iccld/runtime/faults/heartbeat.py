"""Heartbeats: where every rank is, for the others to see, and which rank holds them up.

    run_dir/heartbeats/rank_00003.json

The thread of each rank replaces its file every few seconds. A beat that stands still is a process or a node that is
gone, stopped, or cannot run a thread. Clocks of nodes are not compared: a reader sees with its own clock whether a beat
moves.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from iccld.durable import write_whole
from iccld.reading import read_json


@dataclass(frozen=True)
class Heartbeat:
    """Position of a rank. `moves`: phases entered since the attempt began; all ranks enter them in the same order."""

    rank: int
    host: str
    pid: int
    attempt: str  # the same on all ranks
    stage: str = ""
    step: int = 0  # the number of steps done
    phase: str = "start"
    moves: int = 0
    in_phase_s: float = 0.0
    collectives: list[int] = field(default_factory=list)  # begun, by group
    time: float = 0.0
    beat: int = 0
    ended: str = ""  # "in order", or the error

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @property
    def place(self) -> str:
        return f"phase {self.phase} of {self.stage} step {self.step}" if self.stage else f"phase {self.phase}"


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "heartbeats" / f"rank_{rank:05d}.json"


def write_heartbeat(run_dir: Path, heartbeat: Heartbeat) -> None:
    path = heartbeat_path(run_dir, heartbeat.rank)
    write_whole(path, json.dumps(dataclasses.asdict(heartbeat)), durably=False)


def read_heartbeat(run_dir: Path, rank: int) -> Heartbeat | None:
    """Read a heartbeat; None if there is none that can be read."""
    try:
        return Heartbeat(**read_json(heartbeat_path(run_dir, rank)))
    except (OSError, ValueError, TypeError):
        return None


class Peers:
    """Heartbeats of one attempt's ranks, and for how long each has stood still."""

    def __init__(self, run_dir: Path, *, attempt: str, world_size: int) -> None:
        self.run_dir, self.attempt, self.world_size = run_dir, attempt, world_size
        self.seen: dict[int, Heartbeat] = {}
        self._since: dict[int, float] = {}

    def look(self, now: float) -> None:
        for rank in range(self.world_size):
            heartbeat = read_heartbeat(self.run_dir, rank)
            if heartbeat is None or heartbeat.attempt != self.attempt:
                self._since.setdefault(rank, now)
            elif rank not in self.seen or heartbeat.beat != self.seen[rank].beat:
                self.seen[rank], self._since[rank] = heartbeat, now

    def still(self, now: float, *, for_s: float) -> set[int]:
        """Return the ranks whose beat did not move for so long."""
        return {rank for rank, since in self._since.items() if now - since >= for_s}

    def ended(self) -> set[int]:
        """Return the ranks that have ended by an error."""
        return {rank for rank, heartbeat in self.seen.items() if heartbeat.ended not in ("", "in order")}

    def forget(self) -> None:
        self.seen, self._since = {}, {}


def held_up_by(seen: Mapping[int, Heartbeat], still: set[int], *, world_size: int) -> dict[int, str]:
    """Return the ranks that hold up the others, with the facts about each in words; {} if no rank is behind.

    They are, in this order: ranks without a beat; those in the earliest phase; those that have not come to a collective
    in which others wait.
    """
    missing = {rank: f"rank {rank} has not begun" for rank in range(world_size) if rank not in seen}
    gone = {rank: _gone(seen[rank]) for rank in sorted(still & seen.keys())}
    gone |= {rank: _gone(h) for rank, h in seen.items() if h.ended not in ("", "in order")}
    if missing or gone:
        return missing | gone
    moves = {rank: heartbeat.moves for rank, heartbeat in seen.items()}
    behind = [rank for rank in sorted(seen) if moves[rank] < max(moves.values())]
    first = [rank for rank in behind if moves[rank] == min(moves.values())]
    return {rank: _stopped(seen[rank]) for rank in first or _behind_in_a_group(seen)}


def _behind_in_a_group(seen: Mapping[int, Heartbeat]) -> list[int]:
    """Return the fewest ranks that are behind in one group, or wait in another collective than all others."""
    candidates = []
    for counts in zip(*(seen[rank].collectives for rank in sorted(seen)), strict=False):
        behind = [rank for rank, count in zip(sorted(seen), counts, strict=True) if count < max(counts)]
        candidates += [behind] if behind else []
    if not candidates:
        return []
    fewest = min(len(behind) for behind in candidates)
    return sorted({rank for behind in candidates if len(behind) == fewest for rank in behind})


def _gone(heartbeat: Heartbeat) -> str:
    if heartbeat.ended:
        return f"{heartbeat} ended in {heartbeat.place}: {heartbeat.ended}"
    return f"{heartbeat} gives no sign of life (ended, stopped, or its node is gone), last in {heartbeat.place}"


def _stopped(heartbeat: Heartbeat) -> str:
    return f"{heartbeat} stopped in {heartbeat.place}, {heartbeat.in_phase_s:.0f} s ago"
