"""Watchdog: a thread a rank that sees a run stand still, says which rank holds it up, and ends the process.

The loop tells it the position (stage, step, phase), which costs an assignment. A rank that stays in a phase for longer
than its limit reads all heartbeats, names the ranks that are behind in one line on stderr and in `events.jsonl`, dumps
the stacks of its threads to `run_dir/logs/stacks_rank_00003.txt` (and NCCL's record of its collectives), and ends with
status STOPPED_BY_WATCHDOG. So do ranks whose collective failed because another is gone, and a rank whose launcher is
gone; if one has refused for all (`refusal`), the others end with its status. If no thread can run (code that keeps the
interpreter's lock), a timer in C writes the stacks to stderr and ends the process with status 1; the others name it.

Collectives time out later than the watchdog ends the process, since they cannot say which rank they waited for.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from iccld.durable import clear_away, create, make_folder
from iccld.node import host_name
from iccld.outcome import REFUSED, say
from iccld.runtime.faults.heartbeat import Heartbeat, Peers, held_up_by, write_heartbeat
from iccld.runtime.faults.preemption import STOPPED_BY_WATCHDOG
from iccld.runtime.faults.refusal import Refusal
from iccld.runtime.measure.telemetry import write_event
from iccld.runtime.measure.terminal import Place
from iccld.runtime.ranks import Ranks, is_failure, num_begun, write_record
from iccld.runtime.settings import WATCHED_BEATS, WatchdogConfig

LOST_BEATS = 3  # a rank whose beat stands still for so many beats is gone
MAX_NAMED = 4  # the most ranks that one line names
END_S = 30.0  # limit of exit handlers that may hang


class _Position(NamedTuple):
    stage: str = ""
    step: int = 0
    phase: str = "start"
    moves: int = 0
    since: float = 0.0
    done: int = 0
    total: int = 0
    passes: int = 0


class Watchdog:
    """Position of this rank; as a context, also the thread that watches over it.

    It also sets the timeout of the ranks' collectives. `attempt` is the same on all ranks, and new in each attempt.
    `beats_in` holds the heartbeats in place of `run_dir`; it is this attempt's own, and removed with its end.
    """

    def __init__(
        self,
        run_dir: Path = Path(),
        config: WatchdogConfig | None = None,
        *,
        ranks: Ranks | None = None,
        attempt: str = "",
        beats_in: Path | None = None,
    ) -> None:
        self.run_dir, self.config, self.beats_in = run_dir, config or WatchdogConfig(), beats_in or run_dir
        self.ranks, self.attempt = ranks or Ranks(), attempt
        self.rank, self.world_size = self.ranks.rank, self.ranks.world_size
        self.has_trained = False
        """True once this attempt has made a step."""
        self._place, self._steps_begun, self._timeout = _Position(since=time.monotonic()), 0, 0.0
        self._armed = 0.0
        self._beat, self._started_by, self._stop = 0, os.getppid(), threading.Event()
        self._peers, self._ending = self._new_peers(), threading.Lock()
        self.refusal = Refusal(self.beats_in / "heartbeats", attempt)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def begin(self, stage: str) -> None:
        """Begin a stage, or the work after the last one."""
        self._steps_begun = 0
        self._move(stage=stage, step=0, phase="start")

    def step(self, step: int) -> None:
        self._steps_begun += 1
        self.has_trained |= self._steps_begun > 1
        self._move(step=step)

    def phase(self, name: str) -> None:
        self._move(phase=name)

    def __str__(self) -> str:
        return f"rank {self.rank} on {host_name()} in {self._heartbeat().place}"

    @property
    def phase_now(self) -> str:
        return self._place.phase

    @contextlib.contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """Surround work that this rank does alone; then the phase before it goes on. It is no move: moves tell ranks
        apart.
        """
        place = self._place
        self._place = place._replace(phase=phase, since=time.monotonic())
        try:
            yield
        finally:
            self._place = place._replace(since=time.monotonic())

    def tick(self, done: int = 0, total: int = 0) -> None:
        """Something was done within the phase: `done` of `total` images, or what is not counted."""
        passes = self._place.passes + (total > 0 and done == 0)
        self._place = self._place._replace(since=time.monotonic(), done=done, total=total, passes=passes)

    @property
    def place(self) -> Place:
        """Place of this rank in its run, to be shown."""
        place = self._place
        return Place(place.stage, place.step, place.phase, place.done, place.total, place.passes)

    def _move(self, **where: str | int) -> None:
        place = self._place
        moved: Any = {"moves": place.moves + 1, "since": time.monotonic(), "done": 0, "total": 0, "passes": 0, **where}
        self._place = place._replace(**moved)
        limit = self._limit()
        if limit != self._armed and self._thread.is_alive():
            self._arm(limit)  # not at the next beat: there may be none
        timeout = self.config.collective_step_s if limit == self.config.step_s else self.config.collective_s
        if timeout != self._timeout:
            self._timeout = timeout
            self.ranks.set_timeout(timeout)

    def _limit(self) -> float:
        """Return the seconds that the rank may spend in its phase."""
        return self.config.limit(self._place.phase, is_first=self._steps_begun < 2)

    def _arm(self, limit: float) -> None:
        """Arm the timer in C. Each beat arms it anew, so it fires only if the thread cannot run."""
        self._armed = limit
        faulthandler.dump_traceback_later(limit + WATCHED_BEATS * self.config.beat_s, exit=True, file=2)

    def __enter__(self) -> Self:
        self._move()
        if self.config.enabled:
            make_folder(self.beats_in / "heartbeats", within=self.run_dir)
            self._write()
            self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self.config.enabled:
            return
        if error is not None and self.world_size > 1 and is_failure(error):
            self._lost(error)
        self._stop.set()
        self._thread.join(END_S)  # met in C++ by the interpreter's end, a thread would abort the process
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # the file system may be what failed
            self._write(ended=f"{type(error).__name__}: {error}".splitlines()[0] if error else "in order")
        if error is not None and self.world_size > 1:
            faulthandler.dump_traceback_later(END_S, exit=True, file=2)  # others wait for its end
        elif self.rank == 0 and self.beats_in != self.run_dir:
            clear_away(self.beats_in)

    def _watch(self) -> None:
        while not self._stop.wait(self.config.beat_s):
            place, now, limit = self._place, time.monotonic(), self._limit()
            self._arm(limit)
            with contextlib.suppress(OSError):  # a file system may be away for a while
                self._write()
            if self.refusal.is_said():
                self._follow()
            if os.getppid() != self._started_by and "RANK" in os.environ:
                self._end({self.rank: f"{self._heartbeat()} lost the process that started it"}, {})
            if now - place.since < limit - WATCHED_BEATS * self.config.beat_s:
                self._peers = self._new_peers()
                continue
            self._peers.look(now)
            if now - place.since >= limit and self._place is place:
                still = self._peers.still(now, for_s=LOST_BEATS * self.config.beat_s) - {self.rank}
                seen = self._peers.seen
                self._end(held_up_by(seen, still, world_size=self.world_size), seen)

    def _follow(self) -> None:
        """End this rank if its main thread does not: one that waits for a device may never see its collective break."""
        if not self._stop.wait(LOST_BEATS * self.config.beat_s):
            os._exit(REFUSED)

    def _new_peers(self) -> Peers:
        return Peers(self.beats_in, attempt=self.attempt, world_size=self.world_size)

    def _heartbeat(self, ended: str = "") -> Heartbeat:
        place = self._place
        return Heartbeat(
            rank=self.rank,
            host=host_name(),
            pid=os.getpid(),
            attempt=self.attempt,
            stage=place.stage,
            step=place.step,
            phase=place.phase,
            moves=place.moves,
            in_phase_s=round(time.monotonic() - place.since, 1),
            collectives=num_begun(),
            time=time.time(),
            beat=self._beat,
            ended=ended,
        )

    def _write(self, ended: str = "") -> None:
        self._beat += 1
        write_heartbeat(self.beats_in, self._heartbeat(ended))

    def _lost(self, error: BaseException) -> None:
        """Wait, after a collective failed, until it can be said which rank is gone."""
        peers, limit = self._new_peers(), time.monotonic() + (LOST_BEATS + 2) * self.config.beat_s
        still: set[int] = set()
        while time.monotonic() < limit and not still and not peers.ended():
            if self.refusal.is_said():
                os._exit(REFUSED)
            time.sleep(self.config.beat_s / 2)  # each look reads the files of all ranks
            peers.look(time.monotonic())
            still = peers.still(time.monotonic(), for_s=LOST_BEATS * self.config.beat_s) - {self.rank}
        why = f"its collective failed ({str(error).splitlines()[0]})"
        self._end(held_up_by(peers.seen, still, world_size=self.world_size), peers.seen, why=why)

    def _end(self, causes: Mapping[int, str], seen: Mapping[int, Heartbeat], *, why: str = "") -> None:
        """Say it, leave the stacks, and end. Ranks that only wait end last, or the cause would end too soon."""
        self._ending.acquire()  # never released: the thread and the main thread do not both end it
        faulthandler.dump_traceback_later(END_S + 2 * self.config.beat_s, exit=True, file=2)
        own = self._heartbeat()
        waiting = [rank for rank in sorted(seen) if rank not in causes]
        speaks = waiting[0] if waiting else min(causes)
        if self.rank == speaks or self.rank in list(causes)[:MAX_NAMED]:
            words = list(causes.values())[:MAX_NAMED] + [f"and {len(causes) - MAX_NAMED} more"] * (
                len(causes) > MAX_NAMED
            )
            words += [f"{own} {why or 'waits'} in {own.place} since {own.in_phase_s:.0f} s"] * (self.rank not in causes)
            words += ["no rank is behind; a device or the network stands still"] * (not causes)
            say("watchdog: " + "; ".join([*words, f"stacks in {self._logs()}"]))
        with contextlib.suppress(OSError, ValueError):
            if self.rank == speaks:
                everybody = {rank: f"rank {rank} waits, as all do" for rank in range(self.world_size)}
                self._note(causes or everybody, {**seen, self.rank: own})
            if self.rank in causes:  # ranks that wait for less long meet a broken collective, and read this
                self._write(ended=f"its watchdog ended it: {causes[self.rank]}")
            self._dump()
        if self.rank not in causes and self.world_size > 1:
            time.sleep(2 * self.config.beat_s)
        os._exit(STOPPED_BY_WATCHDOG)

    def _note(self, causes: Mapping[int, str], seen: Mapping[int, Heartbeat]) -> None:
        for rank, what in list(causes.items())[:MAX_NAMED]:
            known = seen.get(rank)
            where = {"host": known.host, "phase": known.phase, "step": known.step} if known else {}
            sure = len(causes) < self.world_size or self.world_size == 1  # else no rank could be told from the others
            facts = {"stage": self._place.stage, "rank": rank, **where, "sure": sure, "what": what}
            write_event(self.run_dir, "stopped", **facts)

    def _logs(self) -> Path:
        return self.run_dir / "logs"

    def _dump(self) -> None:
        make_folder(self._logs(), within=self.run_dir)
        path = self._logs() / f"stacks_rank_{self.rank:05d}.txt"
        path.unlink(missing_ok=True)
        with create(path) as file:
            file.write(f"{self._heartbeat()} in {self._heartbeat().place}\n\n".encode())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        write_record(self._logs() / f"nccl_rank_{self.rank:05d}.pickle")
