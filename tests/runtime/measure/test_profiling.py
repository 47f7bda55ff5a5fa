"""Phases of a step: they are parts of it, and what is waited for after the own backward pass is told apart."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iccld.runtime.measure.profiling import HostClock, PhaseTimer, summed
from iccld.runtime.measure.throughput import RankSeconds, own_seconds, rates, slow_rank_words, slowest


def test_phases_are_parts_of_their_step():
    timer = PhaseTimer()
    for _ in range(3):
        with timer.phase("data"):
            time.sleep(0.01)
        with timer.phase("forward"), timer.span("agree"):
            time.sleep(0.005)
        with timer.phase("forward"):
            time.sleep(0.005)
        timer.end_step()
    steps = timer.take()
    assert len(steps) == 3 and timer.take() == []
    for step in steps:
        assert step["data"] >= 0.01 and step["forward"] >= 0.01 and step["agree"] >= 0.005
        assert step["data"] + step["forward"] <= step["total"]
    assert summed(steps)["total"] == pytest.approx(sum(step["total"] for step in steps))


def test_what_an_engine_does_after_the_own_backward_pass_is_sync():
    x = torch.ones(8, requires_grad=True)
    queue = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
    waited = x * 2  # as an engine: queues its wait in the midst of the pass
    waited.register_hook(lambda _: queue(lambda: time.sleep(0.05)))
    loss = (waited * 3).sum()
    timer = PhaseTimer()
    with timer.backward(loss):
        loss.backward()
        time.sleep(0.02)  # or after it
    timer.end_step()
    (step,) = timer.take()
    assert step["sync"] >= 0.07 and step["backward"] < 0.05
    assert step["backward"] + step["sync"] <= step["total"]


def test_a_phase_is_observed_when_it_begins_and_kept_after_an_error():
    seen: list[str] = []
    timer = PhaseTimer(observe=seen.append)
    with timer.phase("data"):
        assert seen == ["data"]
    loss = torch.ones(1, requires_grad=True).sum()
    with pytest.raises(OSError, match="x"), timer.backward(loss):
        raise OSError("x")
    assert seen == ["data", "agree", "backward"]


class Delayed(HostClock):
    """Marks that are over only when they are said to be, as a device's are."""

    def __init__(self) -> None:
        self.marks = 0
        self.done = -1

    def mark(self) -> float:
        self.marks += 1
        return float(self.marks - 1)

    def is_over(self, mark: float) -> bool:
        return mark <= self.done


def test_marks_are_read_when_they_are_over_and_none_is_lost():
    timer = PhaseTimer()
    clock = Delayed()
    timer._clock, timer._since = clock, clock.mark()
    for _ in range(2):
        with timer.span("copy"), timer.phase("forward"):  # the copy ends last: for a later step
            pass
        timer.end_step()
    assert timer.take() == []
    clock.done = 5  # the first step's end; it began at 0 and its marks are 1 to 4
    assert timer.take() == [{"total": 5.0, "copy": 3.0, "forward": 1.0}]
    clock.done = 99
    assert timer.take() == [{"total": 5.0, "copy": 3.0, "forward": 1.0}]


seconds = st.fixed_dictionaries(
    {name: st.floats(0.0, 10.0) for name in ("data", "forward", "backward", "sync", "agree", "save")}
)


@given(st.lists(seconds, min_size=2, max_size=6))
def test_the_slow_rank_is_the_one_that_works_longest(ranks: list[dict[str, float]]):
    records = [RankSeconds(f"n{i}", own | {"total": sum(own.values())}, i) for i, own in enumerate(ranks)]
    facts = rates(records, 2, global_batch_size=4, flops=10.0, peak_flops=0.0) | slowest(records, 2)
    own = [own_seconds(record.seconds) for record in records]
    assert own[facts["slow_rank"]] == max(own)
    assert facts["peak_gib"] == (len(ranks) - 1) / 2**30 and "mfu" not in facts
    assert len(facts["rank_own_s"]) == len(ranks)


def test_the_slow_rank_is_named_though_all_take_as_long():
    fast = {"total": 10.0, "data": 0.1, "forward": 3.0, "backward": 3.0, "sync": 3.9}
    slow = {"total": 10.0, "data": 4.0, "forward": 3.0, "backward": 2.9, "sync": 0.1}
    records = [RankSeconds("a", fast, 1), RankSeconds("b", slow, 2), RankSeconds("c", fast, 3)]
    facts = rates(records, 5, global_batch_size=6, flops=1e9, peak_flops=1e10) | slowest(records, 5)
    assert slow_rank_words(facts) == "  slow: rank 1 on b, 1.62x in data"
    assert facts["samples_per_s"] == 3.0 and facts["samples_per_s_per_rank"] == 1.0
    assert facts["flops_per_s_per_rank"] == 1e9 and facts["mfu"] == pytest.approx(0.1)
    assert facts["data_wait"] == 0.4 and facts["step_s"] == 2.0


def test_nobody_is_called_slow_among_equals():
    even = RankSeconds("a", {"total": 1.0, "forward": 1.0}, 1)
    assert slow_rank_words(slowest([even] * 4, 1)) == ""
    copying = even._replace(seconds=even.seconds | {"copy": 0.9})  # beside its work
    assert (
        slowest([even, even, copying._replace(seconds=copying.seconds | {"total": 1.5})], 1)["slow_rank_phase"]
        == "other"
    )
