"""Lines that a run writes down."""

import json
from pathlib import Path

import pytest
import torch

from iccld.batch_layout import BatchLayout
from iccld.runtime.measure.metric_entries import FORMAT
from iccld.runtime.measure.metrics import MetricsLogger, NonFiniteError, compared
from iccld.runtime.ranks import Ranks
from iccld.runtime.settings import MetricsConfig, WandbMode


def logger(folder: Path, *, wandb: WandbMode = WandbMode.disabled) -> MetricsLogger:
    config = MetricsConfig(log_every=2, wandb=wandb)
    return MetricsLogger(folder, config, stage="stage1", ranks=Ranks(), layout=BatchLayout(4, 4))


def flush(metrics: MetricsLogger, facts: dict[str, float | torch.Tensor] | None = None) -> None:
    metrics.flush(num_steps=10, take_timings=lambda: [{"total": 1.0, "data": 0.25}] * 2, facts=facts)


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_losses_metrics_and_rates_of_a_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    metrics = logger(tmp_path)
    metrics.start(step=0, logger_id=None, config={})
    for step in (1, 2):
        losses = {"source": torch.tensor(float(step)), "mixed": torch.tensor(0.5)}
        metrics.record(step, losses, {"accuracy": torch.tensor([1.0, 4.0]), "empty": torch.tensor([0.0, 0.0])})
    assert metrics.is_due(2) and not metrics.is_due(1)
    facts = {"learning_rate": 0.5, "gradient_norm": torch.tensor(3.0), "other_norm": torch.tensor(torch.inf)}
    flush(metrics, facts=facts)
    (entry,) = entries(tmp_path)
    assert entry["learning_rate"] == 0.5 and entry["gradient_norm"] == 3.0 and "other_norm" not in entry
    assert entry["step"] == 2 and entry["loss"] == 2.5 and entry["loss/source"] == 2.0
    assert entry["accuracy"] == 0.25 and "empty" not in entry
    assert entry["samples_per_s"] == 4.0 and entry["data_wait"] == 0.25
    assert "stage1 step 2/10  loss 2.5000  4.0 samples/s  data wait 25 %  ETA 0:08" in capsys.readouterr().out


def test_histograms_are_summed_over_the_window_and_compared_by_their_shares(tmp_path: Path):
    metrics = logger(tmp_path)
    metrics.start(step=0, logger_id=None, config={})
    for counts in ([[90.0, 10.0, 0.0], [25.0, 0.0, 25.0]], [[0.0, 0.0, 0.0], [25.0, 25.0, 0.0]]):
        more = {"accuracy": torch.tensor([1.0, 4.0]), "none": torch.zeros(2, 3)}
        metrics.record(1, {"source": torch.tensor(1.0)}, {"classes": torch.tensor(counts), **more})
    flush(metrics)
    (entry,) = entries(tmp_path)
    # 0.9 0.1 0 beside 0.5 0.25 0.25: half of 0.4 + 0.15 + 0.25.
    assert entry["classes/distance"] == pytest.approx(0.4) and entry["classes/lost"] == [2]
    assert entry["accuracy"] == 0.25 and not [name for name in entry if name.startswith("none")]


@pytest.mark.parametrize(("count", "lost"), [(4.1, []), (3.9, [1])])
def test_a_bin_is_lost_below_a_fiftieth_of_its_share(count: float, lost: list[int]):
    found = compared("classes", [1000.0 - count, count, 0.0], [400.0, 100.0, 0.0])  # 0.2 / 50 = 0.004
    assert found["classes/lost"] == lost
    assert compared("rare", [1e5, 0.0], [999_999.0, 1.0])["rare/lost"] == [], "the reference has next to none"
    assert compared("same", [2.0, 6.0], [1.0, 3.0]) == {"same/distance": 0.0, "same/lost": []}
    assert compared("apart", [2.0, 0.0], [0.0, 3.0]) == {"apart/distance": 1.0, "apart/lost": [1]}


def test_a_loss_that_is_not_finite_names_loss_step_and_samples(tmp_path: Path):
    metrics = logger(tmp_path)
    metrics.record(5, {"mixed": torch.tensor(1.0)}, {})
    metrics.record(6, {"mixed": torch.tensor(float("nan"))}, {})
    words = r"loss 'mixed' is nan in step 6, samples 20-23 of each stream; .* set stage1\.trainer\.gradient_clip"
    with pytest.raises(NonFiniteError, match=words):
        flush(metrics)


def test_going_on_drops_what_a_crashed_attempt_logged_beyond_the_checkpoint(tmp_path: Path):
    metrics = logger(tmp_path)
    metrics.start(step=0, logger_id=None, config={})
    for step in range(1, 5):
        metrics.record(step, {"source": torch.tensor(float(step))}, {})
        flush(metrics)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "stage1", "st')
    logger(tmp_path).start(step=2, logger_id=None, config={})
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == before[:2], "to the byte"


EARLIER = '{"stage": "stage1", "step": 1, "loss": 0.5}\n{"stage": "stage1", "step": 1, "miou": 9.0}\n'


def test_a_run_of_an_earlier_version_goes_on_with_lines_of_one_format(tmp_path: Path):
    """An earlier version wrote step 1 after two steps, and named no format."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        EARLIER + '{"stage": "stage1", "step": 3, "loss": 0.5}\n{"stage": "stage0", "step": 9, "loss": 0.5}\n'
    )
    metrics = logger(tmp_path)
    metrics.start(step=2, logger_id=None, config={})
    assert [(entry["stage"], entry["step"]) for entry in entries(tmp_path)] == [("stage1", 2)] * 2 + [("stage0", 10)]
    metrics.record(3, {"source": torch.tensor(1.0)}, {})
    flush(metrics)
    once = path.read_bytes()
    logger(tmp_path).start(step=3, logger_id=None, config={})
    assert path.read_bytes() == once, "nothing is converted twice"
    assert [entry["step"] for entry in entries(tmp_path)] == [2, 2, 10, 3]
    assert all(entry["format"] == FORMAT for entry in entries(tmp_path))


WITH_FINAL = EARLIER.splitlines()[0] + '\n{"stage": "stage1", "step": 1, "final/miou": 9.0}\n'


@pytest.mark.parametrize(("text", "owes"), [(EARLIER, False), (EARLIER.splitlines()[0], True), (WITH_FINAL, True)])
def test_a_score_is_owed_for_a_step_that_was_logged_alone(tmp_path: Path, text: str, owes: bool):
    (tmp_path / "metrics.jsonl").write_text(text)
    metrics = logger(tmp_path)
    metrics.start(step=2, logger_id=None, config={})
    assert metrics.owes_scores(2) is owes and not metrics.owes_scores(1) and not metrics.owes_scores(3)


def test_the_arithmetic_is_that_of_the_steps_taken(tmp_path: Path):
    metrics = logger(tmp_path)
    metrics.flops = {0: 1.0, 1: 3.0}.__getitem__
    for step in (1, 2):
        metrics.record(step, {"source": torch.tensor(1.0)}, {})
    flush(metrics)
    (entry,) = entries(tmp_path)
    assert entry["flops_per_s_per_rank"] / entry["samples_per_s"] == 2.0


def test_wandb_offline_keeps_its_run_id(tmp_path: Path):
    metrics = logger(tmp_path, wandb=WandbMode.offline)
    metrics.start(step=0, logger_id="abc123", config={"seed": 0})
    metrics.write({"stage": "stage1", "step": 3, "loss": 1.0})
    metrics.close()
    assert metrics.logger_id == "abc123"
    assert list(tmp_path.glob("wandb/offline-run-*-abc123"))


def test_final_scores_are_in_the_summary_of_a_run_of_wandb_that_has_passed_their_step(tmp_path: Path):
    metrics, scores = logger(tmp_path, wandb=WandbMode.offline), {"final/miou": 0.5, "final/iou/road": 0.75}
    metrics.start(step=0, logger_id="abc124", config={"seed": 0})
    metrics.write({"stage": "stage1", "step": 3, "loss": 1.0})
    metrics.write({"stage": "stage1", "step": 2, **scores})
    (outlet,) = metrics._outlets
    summary = dict(outlet._run.summary)
    metrics.close()
    assert {name: summary.get(name) for name in ("final/miou", "final/iou/road")} == scores


def test_counters_are_exact_also_where_they_are_large(tmp_path: Path):
    metrics = logger(tmp_path)
    metrics.record(1, {"source": torch.tensor(1.0)}, {})
    counters = {"storage_bytes": 2**40 + 1, "retries": 0}
    metrics.flush(num_steps=10, take_timings=lambda: [], counters=counters)
    (entry,) = entries(tmp_path)
    assert entry["data/storage_bytes"] == 2**40 + 1 and "data/retries" not in entry
