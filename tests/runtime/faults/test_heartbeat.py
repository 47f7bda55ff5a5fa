"""Heartbeats tell which ranks hold up the others."""

from pathlib import Path

import pytest

from iccld.runtime.faults.heartbeat import Heartbeat, Peers, heartbeat_path, held_up_by, read_heartbeat, write_heartbeat
from iccld.runtime.faults.watchdog import Watchdog


def beat(rank: int, *, moves: int = 40, collectives: tuple[int, ...] = (9, 9), **facts: str | int) -> Heartbeat:
    where = {"stage": "stage1", "step": 12, "phase": "compute", "attempt": "a", **facts}
    return Heartbeat(rank, f"n{rank}", 100 + rank, moves=moves, collectives=list(collectives), **where)  # type: ignore[arg-type]


def seen(*beats: Heartbeat) -> dict[int, Heartbeat]:
    return {each.rank: each for each in beats}


def test_the_rank_in_the_earliest_phase_holds_up_the_others() -> None:
    beats = seen(beat(0), beat(1, moves=38, phase="data", in_phase_s=20), beat(2), beat(3, moves=39))
    assert held_up_by(beats, set(), world_size=4) == {
        1: "rank 1 on n1 (process 101) stopped in phase data of stage1 step 12, 20 s ago"
    }


@pytest.mark.parametrize(
    ("collectives", "causes"),
    [
        ([(9, 9), (8, 9), (9, 9)], [1]),  # has not come
        ([(9, 9), (9, 9), (9, 8)], [2]),  # nor here
        ([(9, 9), (9, 9), (8, 10)], [2]),  # waits in another one than the others
        ([(9, 9), (9, 9), (9, 9)], []),
    ],
)
def test_in_one_phase_the_rank_that_has_not_come_to_a_collective(
    collectives: list[tuple[int, ...]], causes: list[int]
) -> None:
    beats = seen(*(beat(rank, collectives=counts) for rank, counts in enumerate(collectives)))
    assert list(held_up_by(beats, set(), world_size=3)) == causes


def test_a_rank_without_a_beat_comes_before_all_that_are_behind() -> None:
    beats = seen(beat(0, moves=3), beat(1), beat(2, moves=20))
    assert list(held_up_by(beats, {2}, world_size=3)) == [2]
    assert "rank 2 on n2 (process 102) gives no sign of life" in held_up_by(beats, {2}, world_size=3)[2]
    assert held_up_by(beats, set(), world_size=4) == {3: "rank 3 has not begun"}
    beats[1] = beat(1, ended="OSError: no space")
    assert held_up_by(beats, set(), world_size=3) == {
        1: "rank 1 on n1 (process 101) ended in phase compute of stage1 step 12: OSError: no space"
    }


def test_a_beat_stands_still_by_the_reader_s_clock(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    peers = Peers(tmp_path, attempt="a", world_size=3)
    write_heartbeat(tmp_path, beat(0, beat=1))
    write_heartbeat(tmp_path, beat(1, beat=1))
    write_heartbeat(tmp_path, beat(2, beat=1, attempt="an earlier one"))
    peers.look(100.0)
    assert set(peers.seen) == {0, 1} and not peers.still(102.9, for_s=3)
    write_heartbeat(tmp_path, beat(0, beat=2))
    peers.look(103.0)
    assert peers.still(103.0, for_s=3) == {1, 2} and set(peers.seen) == {0, 1}
    write_heartbeat(tmp_path, beat(1, beat=2))
    peers.look(104.0)
    assert peers.still(104.0, for_s=3) == {2}


def test_a_file_that_is_none_is_no_beat(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    for text in ("", "{", "[]", '{"rank": 0}', '{"of": "another version"}'):
        heartbeat_path(tmp_path, 0).write_text(text)
        assert read_heartbeat(tmp_path, 0) is None
    write_heartbeat(tmp_path, beat(0))
    assert read_heartbeat(tmp_path, 0) == beat(0)


def test_what_a_rank_does_aside_makes_it_neither_ahead_nor_behind(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path)
    watchdog.begin("stage1")
    watchdog.phase("prepare")
    before = watchdog._heartbeat()
    with watchdog.aside("save"):
        assert watchdog.phase_now == "save" and watchdog._heartbeat().moves == before.moves
    after = watchdog._heartbeat()
    assert (after.moves, after.phase, after.step) == (before.moves, "prepare", before.step)
