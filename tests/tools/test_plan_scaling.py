"""The plan: what must hold of the model, bad input in one line, and a link between real ranks."""

import json
import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_scaling
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaling.links import PASSES, Cost, Network, Took, fit, nominal, summary
from scaling.model import MIB, NUM_SMALL, ZERO_BUCKET, Failures, accumulation, buckets, exposed, predict
from scaling.profile import ENGINES, NORMAL, Profile, log_spread, read_profile, slowest

from tests.forked import Forked

ROOT = Path(__file__).parents[2]
INSTANT = Network(*[nominal(alpha_us=0, gb_per_s=math.inf)] * 2, 8)
PHASES = {"data": 0.01, "prepare": 0.2, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "average": 0.03}
FIGURES: dict[str, Any] = {
    "format": 1,
    "stage": "stage2",
    "engine": "ddp",
    "world_size": 1,
    "device": "some GPU",
    "micro_batch_size": 2,
    "num_accumulation": 2,
    "gradient_bytes": 400_000_000,
    "teacher_bytes": 400_000_000,
    "save_stall_s": 0.5,
    "checkpoint_bytes": 1_600_000_000,
    "ranks": [{"rank": 0, "step_s": [1.3, 1.3, 1.3], "phases": PHASES | {"sync": 0.0, "agree": 0.02}}],
}


def profile_of(tmp_path: Path, **changes: Any) -> Profile:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(FIGURES | changes))
    return read_profile(path)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return profile_of(tmp_path)


def network(gb_per_s: float, *, alpha_us: float = 10.0, ranks_per_node: int = 8) -> Network:
    link = nominal(alpha_us=alpha_us, gb_per_s=gb_per_s)
    return Network(link, link, ranks_per_node)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_rank_is_the_profile(profile: Profile, engine: str) -> None:
    step = predict(profile, engine, network(0.001), 1)
    assert step.step_s == pytest.approx(1.3) and step.sent_bytes == 0
    assert step.global_batch_size == 4 and step.samples_per_s == pytest.approx(4 / 1.3)


@pytest.mark.parametrize("num_ranks", [2, 64, 4096])
def test_over_instant_links_a_step_is_its_computation(profile: Profile, num_ranks: int) -> None:
    assert predict(profile, "ddp", INSTANT, num_ranks).step_s == pytest.approx(1.3)
    for engine, split in (("zero1", 0.05), ("zero2", 0.05), ("fsdp2", 0.08)):
        step = predict(profile, engine, INSTANT, num_ranks)
        assert step.step_s == pytest.approx(1.3 - split * (1 - 1 / num_ranks))


def test_the_slowest_rank_is_taken_without_its_waits(tmp_path: Path) -> None:
    fast = {"step_s": [2.0], "phases": {"forward": 0.5, "sync": 1.2, "agree": 0.2}}
    slow = {"step_s": [2.0], "phases": {"forward": 1.5, "sync": 0.2, "agree": 0.1}}
    profile = profile_of(tmp_path, world_size=2, ranks=[fast, slow])
    assert profile.own_s == pytest.approx(1.7) and profile.phases["forward"] == 1.5


@given(
    engine=st.sampled_from(ENGINES),
    num_ranks=st.integers(1, 4096),
    slow=st.floats(0.01, 1000),
    faster=st.floats(1, 100),
    alpha_us=st.floats(0, 1000),
    device=st.sampled_from(["cpu", "some GPU"]),
)
def test_no_faster_link_makes_a_step_longer(
    engine: str, num_ranks: int, slow: float, faster: float, alpha_us: float, device: str
) -> None:
    profile = replace(BARE, device=device)
    steps = [predict(profile, engine, network(gb, alpha_us=alpha_us), num_ranks) for gb in (slow, slow * faster)]
    assert steps[1].step_s <= steps[0].step_s * (1 + 1e-9)
    assert steps[1].step_s >= steps[1].own_s * (1 - 1e-9) and steps[0].sent_bytes == steps[1].sent_bytes


@given(num_ranks=st.integers(2, 4096))
def test_engines_send_what_their_collectives_do(num_ranks: int) -> None:
    sent = {engine: predict(BARE, engine, INSTANT, num_ranks).sent_bytes for engine in ENGINES}
    assert sent["ddp"] == pytest.approx(2 * (num_ranks - 1) / num_ranks * BARE.gradient_bytes, rel=1e-6)
    assert sent["fsdp2"] / sent["ddp"] == pytest.approx(1.5, rel=1e-6)
    assert sent["zero1"] / sent["ddp"] == pytest.approx(1.5, rel=1e-6)


def test_zero_waits_for_small_messages() -> None:
    """Three small sums and two small gathers besides its buckets; each turn of a ring costs alpha."""
    steps = [predict(BARE, "zero1", network(1e9, alpha_us=us), 2).step_s for us in (0, 1000)]
    sums, gathers = 3 + math.ceil(BARE.gradient_bytes / ZERO_BUCKET), 2 + 1
    assert 1000 * (steps[1] - steps[0]) == pytest.approx(2 * (NUM_SMALL + sums) + gathers, rel=1e-3)


def test_more_micro_batches_gather_more_but_average_once() -> None:
    once, thrice = BARE, replace(BARE, num_accumulation=3)
    sent = {e: [predict(p, e, INSTANT, 8).sent_bytes / BARE.gradient_bytes for p in (once, thrice)] for e in ENGINES}
    assert sent["ddp"][1] == sent["ddp"][0] and sent["zero1"][1] == sent["zero1"][0]
    assert sent["fsdp2"][1] - sent["fsdp2"][0] == pytest.approx(2 * 2 * 7 / 8)
    assert sent["zero2"][1] - sent["zero2"][0] == pytest.approx(2 * 2 * 7 / 8)


@given(
    window=st.floats(0, 10),
    times=st.lists(st.floats(0, 3), min_size=1, max_size=20),
    busy=st.floats(0, 1),
)
def test_messages_hide_behind_computing_but_the_last(window: float, times: list[float], busy: float) -> None:
    messages = [(1 / len(times), Took(seconds, busy * seconds)) for seconds in times]
    found = exposed(window, messages)
    total = sum(times)
    assert max(times[-1], total - window, busy * total) - 1e-6 <= found <= total + 1e-6
    if busy == 1:
        assert found == pytest.approx(total, abs=1e-6)


def test_a_message_waits_for_the_one_before_it() -> None:
    """Ready at 1 and 2, they take 3 and 1: through at 4 and 5."""
    assert exposed(2.0, [(0.5, Took(3.0, 0.0)), (0.5, Took(1.0, 0.0))]) == pytest.approx(3.0)


@given(num_bytes=st.floats(1, 1e10), first=st.sampled_from([0.0, float(MIB)]))
def test_buckets_hold_all(num_bytes: float, first: float) -> None:
    found = buckets(num_bytes, 25 * MIB, first=first)
    assert sum(found) == pytest.approx(num_bytes) and min(found) > 0 and max(found) <= 25 * MIB


def test_nodes_are_rings_of_their_own() -> None:
    """16 ranks in 2 nodes, by hand: 7 turns inside on an eighth, one between on a half of an eighth; there and back."""
    inside, between = nominal(alpha_us=1, gb_per_s=100), nominal(alpha_us=10, gb_per_s=10)
    took = Network(inside, between, 8).took("all_reduce", 8e9, 16)
    assert took.seconds == pytest.approx(2 * (7 * (1e-6 + 1e9 / 100e9) + 1 * (10e-6 + 0.5e9 / 10e9)))


@given(alpha=st.floats(1e-6, 1e-2), beta=st.floats(1e-12, 1e-6), num_ranks=st.integers(2, 64))
def test_the_fit_finds_what_the_times_were_made_of(alpha: float, beta: float, num_ranks: int) -> None:
    link = {collective: Cost(alpha, beta) for collective in PASSES}
    ring = Network(link, link, num_ranks)
    for collective in PASSES:
        sizes = {4 << n: ring.took(collective, 4 << n, num_ranks).seconds for n in range(8, 27, 2)}
        cost, misfit = fit(sizes, collective=collective, num_ranks=num_ranks)
        assert cost.alpha_s == pytest.approx(alpha, rel=1e-3, abs=1e-9) and misfit < 1e-3
        assert cost.s_per_byte == pytest.approx(beta, rel=1e-3, abs=1e-9 * alpha)


def test_a_fit_by_medians_is_not_moved_by_a_few_slow_ones() -> None:
    exact = {size: [Took(1e-4 + 1e-9 * size, 0.0)] * 9 + [Took(5.0, 0.0)] * 3 for size in (4096, 1 << 20, 1 << 24)}
    found = summary(dict.fromkeys(PASSES, exact), num_ranks=2, on_device=False)["collectives"]["all_gather"]
    assert found["alpha_s"] == pytest.approx(1e-4) and found["s_per_byte"] == pytest.approx(2e-9)


@given(num_ranks=st.integers(1, 4096))
def test_the_slowest_of_many(num_ranks: int) -> None:
    """Blom's formula against the integral of 1 - F^n."""
    values = [-7.995 + 0.01 * i for i in range(1600)]
    below = [NORMAL.cdf(z) ** num_ranks for z in values]
    expected = sum(0.01 * (1 - p if z > 0 else -p) for z, p in zip(values, below, strict=True))
    assert slowest(num_ranks) == pytest.approx(expected, abs=0.03)


def test_spread_is_from_step_to_step_and_grows_with_ranks() -> None:
    draw = random.Random(0)
    steps = [draw.lognormvariate(0.5, 0.1) for _ in range(20_000)]
    assert log_spread(steps) == pytest.approx(0.1, rel=0.03)
    assert log_spread([seconds * (1 + i / 5000) for i, seconds in enumerate(steps)]) == pytest.approx(0.1, rel=0.03)
    assert log_spread([1.0] * 39 + [100.0]) == log_spread([1.0]) == 0
    later = [predict(replace(BARE, spread=0.1), "ddp", INSTANT, n).straggler_s for n in (1, 2, 64, 4096)]
    assert later == sorted(later) and later[0] == 0 < later[1]


def test_a_save_is_as_far_away_as_young_and_daly_say() -> None:
    """Daly 2006, figure 3: failures every 24 hours, saves of 5 minutes: 117 minutes."""
    failures = Failures(node_mttf_s=24 * 3600, restart_s=600, stall_s=300, write_s=0)
    assert failures.interval_s(1, 1.0) / 60 == pytest.approx(117, abs=1)
    rare = replace(failures, node_mttf_s=1e9)
    assert rare.interval_s(1, 1.0) == pytest.approx(math.sqrt(2 * 300 * 1e9), rel=0.01)
    assert replace(failures, node_mttf_s=math.inf).slowdown(1, 1.0) == 1.0
    assert replace(failures, node_mttf_s=60).slowdown(512, 1.0) == math.inf


@given(
    nodes=st.integers(1, 512),
    mttf_h=st.floats(500, 1e5),
    stall=st.floats(0, 30),
    restart=st.floats(0, 3600),
    write=st.floats(0, 300),
)
def test_failures_cost_more_on_more_nodes(
    nodes: int, mttf_h: float, stall: float, restart: float, write: float
) -> None:
    failures = Failures(node_mttf_s=3600 * mttf_h, restart_s=restart, stall_s=stall, write_s=write)
    few, many = (failures.slowdown(n, 0.5) for n in (nodes, nodes + 1))
    assert 1 <= few <= many * (1 + 1e-9)


def test_a_fixed_batch_leaves_less_to_accumulate_and_then_nothing(profile: Profile) -> None:
    assert [accumulation(profile, n, 64) for n in (1, 4, 32)] == [32, 8, 1]
    assert [accumulation(profile, n, None) for n in (1, 4, 32)] == [2, 2, 2]
    for num_ranks in (64, 3):
        with pytest.raises(ValueError, match=f"64 is no multiple of micro-batch 2 x {num_ranks}"):
            accumulation(profile, num_ranks, 64)
    fixed = predict(profile, "ddp", INSTANT, 32, 64)
    assert fixed.global_batch_size == 64 and fixed.own_s == pytest.approx(1.3 - 1.11 / 2)


@pytest.fixture
def plan(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return the words of the script in the folder of the profile, run in this process."""

    def words(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["plan_scaling", *arguments])
        plan_scaling.main()
        return capsys.readouterr().out

    return words


def test_a_plan_is_a_table_a_plot_and_figures(plan: Callable[..., str], tmp_path: Path) -> None:
    said = plan("profile.json", "--json", "plan.json", "--png", "plan.png", "--global-batch", "512")
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert len(figures["plan"]) == 4 * 13 and len(figures["assumptions"]) == 7
    for row in figures["plan"]:
        if row["num_ranks"] > 256:
            assert "no multiple" in row["refused"]
            continue
        assert row["step_s"] == pytest.approx(row["own_s"] + row["exposed_s"] + row["straggler_s"])
        assert row["hours"] == pytest.approx(40_000 * row["step_s"] / row["goodput"] / 3600)
        assert row["samples_per_s"] == pytest.approx(512 / row["step_s"])
    words = " ".join(said.split())
    assert "refused" in words and "(Blom 1958)" in words and "links nominal" in words


@pytest.mark.parametrize("hours", ["inf", "0.001"])  # of a node that never fails, and of one that lets no run end
def test_what_is_infinite_is_null_in_the_figures(plan: Callable[..., str], tmp_path: Path, hours: str) -> None:
    sizes, infinite = ("--gpus", "8", "4096"), ("--gb-per-s", "inf", "1", "--mttf-node-hours", hours)
    plan("profile.json", "--json", "plan.json", *sizes, *infinite)
    text = (tmp_path / "plan.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    last = json.loads(text)["plan"][-1]
    assert last["step_s"] > 0 and last["save_every_s" if hours == "inf" else "hours"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a profile.json"),
        (["none.json"], "none.json is not a profile.json"),
        (["profile.json", "--gpus", "0"], "--gpus 0 must be above 0"),
        (["profile.json", "--link", "profile.json"], "is not what --measure-link writes"),
        (["profile.json", "--link", "a", "--alpha-us", "1", "1"], "--link takes one or two files"),
        (["profile.json", "--gb-per-s", "0", "1"], "above 0"),
        (["profile.json", "--mttf-node-hours", "0"], "--mttf-node-hours must be above 0"),
        (["profile.json", "--mttf-node-hours", "nan"], "--mttf-node-hours must be above 0"),
        (["profile.json", "--restart-s", "nan"], "at least 0"),
        (["profile.json", "--storage-gb-per-s", "nan"], "--storage-gb-per-s nan must be above 0"),
        (["profile.json", "--gb-per-s", "1", "nan"], "above 0"),
        (["sharded.json"], "profile it on one rank"),
        (["--measure-link"], "at least 2 processes"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    profile: Profile, tmp_path: Path, refusal: Callable[..., str], arguments: list[str], words: str
) -> None:
    (tmp_path / "sharded.json").write_text(json.dumps(FIGURES | {"engine": "fsdp2", "world_size": 2}))
    said = refusal("scripts/plan_scaling.py", *arguments)
    assert said.startswith("plan_scaling: ") and words in said and "\n" not in said


@pytest.mark.distributed
def test_a_link_is_measured_by_a_launch_of_two(plan: Callable[..., str], tmp_path: Path) -> None:
    launch = ["--standalone", "--nproc-per-node", "2", str(ROOT / "tools" / "scripts" / "plan_scaling.py")]
    words, log = [*launch, "--measure-link", "--json", "link.json"], tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = Forked("torch.distributed.run", words, environment=environment, log=log, folder=tmp_path)
    assert launcher.wait(200) == 0, log.read_text()[-3000:]
    for cost in json.loads((tmp_path / "link.json").read_text())["collectives"].values():
        assert cost["alpha_s"] + cost["s_per_byte"] > 0 and 0 <= cost["busy"] <= 1 and cost["misfit"] >= 0
    assert "links measured" in plan("profile.json", "--link", "link.json", "--gpus", "2")


BARE = Profile(
    engine="ddp",
    stage="stage2",
    device="some GPU",
    world_size=1,
    micro_batch_size=2,
    num_accumulation=1,
    gradient_bytes=4e8,
    teacher_bytes=4e8,
    save_stall_s=0.5,
    checkpoint_bytes=1.6e9,
    phases=PHASES,
    spread=0.0,
)
