"""Display of a run for the person who looks on: plain lines, or on a terminal a header and a line that lives.

Neither is silent for long: plain lines say every few seconds what is done between steps.

Importing it is cheap, so that it can speak while the rest is imported.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, Self

from iccld import outcome
from iccld.node import launched_rank

REFRESHES_PER_S = 4
QUIET_S = 3.0  # after which a plain line says what is done
FRAMES = "|/-\\"
BETWEEN_STEPS = {
    "start": "getting ready",
    "preflight": "trying devices, disk and shards",
    "evaluate": "scoring",
    "save": "saving",
    "finish": "leaving the models",
}
"""Phases of the watchdog that may last, in words; all others are parts of a step."""


class Place(NamedTuple):
    """Place of this rank: the steps done and the phase; in it, images that are scored of how many, and which pass."""

    stage: str
    step: int
    phase: str
    done: int = 0
    total: int = 0
    passes: int = 0


class Placed(Protocol):
    """Object that knows where this rank is: the watchdog."""

    @property
    def place(self) -> Place: ...


class Terminal:
    """Plain lines, for pipes and files; as a context, what is alive while the run is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def header(self, facts: Mapping[str, str]) -> None:
        """Show what a stage is trained with, by name; plain lines leave it out."""

    def follow(self, placed: Placed) -> None:
        """Ask it from now on where this rank is."""

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Take note of an event of the run."""

    def scored(self, entry: Mapping[str, Any]) -> None:
        """Take note of a line of metrics.jsonl that may hold a score."""

    def progress(self, entry: Mapping[str, Any], num_steps: int) -> None:
        """Show a line of metrics.jsonl that holds losses and rates."""
        print(plain_line(entry, num_steps), flush=True)


class Follower(Terminal):
    """Terminal that knows what the run is at: the stage, the last figures, score and checkpoint."""

    def __init__(self, doing: str) -> None:
        self._doing, self._since, self._last = doing, time.monotonic(), ("", "steps")
        self._placed: Placed | None = None
        self._stage, self._entry = "", dict[str, Any]()
        self._num_steps, self._score, self._saved = 0, "", 0

    def header(self, facts: Mapping[str, str]) -> None:
        self._stage, self._entry, self._num_steps, self._score, self._saved = facts["stage"], {}, 0, "", 0

    def follow(self, placed: Placed) -> None:
        self._placed = placed

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        if kind in ("saved", "started"):
            self._saved = facts["step"]

    def scored(self, entry: Mapping[str, Any]) -> None:
        if "miou" in entry:
            self._score = f"mIoU {entry['miou']:.2f} (step {entry['step']})"

    def progress(self, entry: Mapping[str, Any], num_steps: int) -> None:
        self._entry, self._num_steps = dict(entry), num_steps

    def _now_at(self, now: float) -> tuple[Place, Mapping[str, Any]]:
        """Return where the run is, and the last figures of that stage; note since when it is there."""
        place = self._placed.place if self._placed else Place("", 0, "")
        now_at = (place.stage, place.phase if place.phase in BETWEEN_STEPS else "steps")
        if now_at != self._last:
            self._last, self._since = now_at, now
        return place, self._entry if place.stage == self._stage else {}

    def _at(self, place: Place, entry: Mapping[str, Any], now: float) -> Iterator[str]:
        """Stage and step, and what is done between steps or before the first figures, with its time."""
        step = max(place.step, entry.get("step", 0))
        of_all = f"/{self._num_steps}" if entry else ""
        yield f"{place.stage} {step}{of_all}" if step else place.stage
        if doing := self._activity(place, entry):
            yield f"{doing}, {_clock(now - self._since)}"

    def _activity(self, place: Place, entry: Mapping[str, Any]) -> str:
        if not place.phase:
            return self._doing
        if place.phase not in BETWEEN_STEPS:
            return "" if entry else "first steps"
        again = f", pass {place.passes}" if place.passes > 1 else ""
        return BETWEEN_STEPS[place.phase] + (f" {place.done} of {place.total} images{again}" if place.total else "")


class PlainTerminal(Follower):
    """Plain lines; a thread says what is done between steps, whenever it has lasted for `QUIET_S` since a line."""

    def __init__(self, doing: str) -> None:
        super().__init__(doing)
        self._said_at, self._end = self._since, threading.Event()
        self._thread = threading.Thread(target=self._speak, name="terminal", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def progress(self, entry: Mapping[str, Any], num_steps: int) -> None:
        super().progress(entry, num_steps)
        self._said_at = time.monotonic()
        Terminal.progress(self, entry, num_steps)

    def line(self, now: float) -> str:
        """Name what is done between steps; empty among steps whose figures are shown."""
        place, entry = self._now_at(now)
        return "  ".join(filter(None, self._at(place, entry, now))) if self._activity(place, entry) else ""

    def due(self, now: float) -> str:
        """The line to be said `now`, if it has been quiet for `QUIET_S`."""
        line = self.line(now)
        if not line or now - self._said_at < QUIET_S:
            return ""
        self._said_at = now
        return line

    def _speak(self) -> None:
        while not self._end.wait(QUIET_S / 8):
            if line := self.due(time.monotonic()):
                with contextlib.suppress(OSError, ValueError):  # nobody may read on; the main thread meets it, too
                    sys.stdout.write(f"{line}\n")
                    sys.stdout.flush()


class LiveTerminal(Follower):
    """A header, and one line that is drawn again several times a second by a thread of its own.

    Whatever else is printed appears above that line.
    """

    def __init__(self, doing: str) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(doing)
        self._console = Console()
        options: dict[str, Any] = {"refresh_per_second": REFRESHES_PER_S, "transient": True}
        self._live = Live(console=self._console, get_renderable=self._shown, **options)

    def __enter__(self) -> Self:
        self._live.start()
        self._console.show_cursor(True)  # a process that is ended at once could not bring it back
        outcome.over_live_line(True)
        return self

    def __exit__(self, *_: object) -> None:
        outcome.over_live_line(False)
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._live.stop()

    def header(self, facts: Mapping[str, str]) -> None:
        from rich.table import Table
        from rich.text import Text

        super().header(facts)
        grid = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            grid.add_row(Text(name, style="bold"), Text(value))
        self._console.print(grid)

    def progress(self, entry: Mapping[str, Any], num_steps: int) -> None:
        super().progress(entry, num_steps)
        if entry["step"] == num_steps:
            Terminal.progress(self, entry, num_steps)  # what stays of a stage

    def _shown(self) -> Any:
        from rich.text import Text

        return Text(self.line(time.monotonic()), overflow="fold")

    def line(self, now: float) -> str:
        """The line as it is `now`, in seconds of the monotonic clock."""
        frame = FRAMES[int(now * REFRESHES_PER_S) % len(FRAMES)]
        return "  ".join(filter(None, [frame, *self._parts(now)]))

    def _parts(self, now: float) -> Iterator[str]:
        place, entry = self._now_at(now)
        yield from self._at(place, entry, now)
        yield from figures(entry)
        if place.stage == self._stage:  # else the figures are those of the stage before
            yield self._score
            yield f"saved {self._saved}" if self._saved else ""
        if "step_s" in entry:
            step = max(place.step, entry["step"])
            yield f"ETA {_clock((self._num_steps - step) * entry['step_s'])}"


def figures(entry: Mapping[str, Any]) -> Iterator[str]:
    """The figures of a line of metrics.jsonl, in words."""
    if "loss" not in entry:
        return
    yield f"loss {entry['loss']:.4f}"
    if "step_s" in entry:
        yield f"{entry['samples_per_s']:.1f} samples/s"
        yield f"data wait {100 * entry['data_wait']:.0f} %"
    if "slow_rank" in entry:
        from iccld.runtime.measure.throughput import slow_rank_words

        yield slow_rank_words(entry).strip()
    rates = [f"{value:.1e}" for name, value in entry.items() if name.startswith("learning_rate")]
    if rates:
        yield f"lr {' '.join(dict.fromkeys(rates))}"


def plain_line(entry: Mapping[str, Any], num_steps: int) -> str:
    """A line of metrics.jsonl as a plain line."""
    from iccld.runtime.measure.throughput import slow_rank_words  # which brings torch

    line = f"{entry['stage']} step {entry['step']}/{num_steps}  loss {entry['loss']:.4f}"
    if "step_s" not in entry:
        return line
    line += f"  {entry['samples_per_s']:.1f} samples/s  data wait {100 * entry['data_wait']:.0f} %"
    line += f"  MFU {100 * entry['mfu']:.0f} %" if "mfu" in entry else ""
    return f"{line}  ETA {_clock((num_steps - entry['step']) * entry['step_s'])}{slow_rank_words(entry)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def is_main() -> bool:
    """Tell whether this process is rank 0, or none of several."""
    return not launched_rank() and sys.stdout is not None


def is_watched() -> bool:
    """Tell whether rank 0 of a run writes to a terminal that can redraw a line."""
    return is_main() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def open_terminal(doing: str) -> Terminal:
    """A live line on a terminal, which begins with what is done; plain lines elsewhere, those of rank 0 every while."""
    if is_watched():
        return LiveTerminal(doing)
    return PlainTerminal(doing) if is_main() else Terminal()
