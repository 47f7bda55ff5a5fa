"""TensorBoard gets the same curves, and ends no run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iccld.batch_layout import BatchLayout
from iccld.runtime.measure.metrics import MetricsLogger
from iccld.runtime.measure.tensorboard import TensorBoardRun
from iccld.runtime.ranks import Ranks
from iccld.runtime.settings import Logger, MetricsConfig

FULL = """
import resource, signal, sys
from pathlib import Path
from iccld.runtime.measure.tensorboard import TensorBoardRun
run = TensorBoardRun()
run.start(Path(sys.argv[1]), "stage1", step=0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(100):
    run.log({f"loss/{i}": 0.5 for i in range(10)}, step=step)
run.finish()
print("trained")
"""


def logger(folder: Path, *, step: int) -> MetricsLogger:
    config = MetricsConfig(loggers=[Logger.jsonl, Logger.tensorboard])
    metrics = MetricsLogger(folder, config, stage="stage1", ranks=Ranks(), layout=BatchLayout(4, 4))
    metrics.start(step=step, logger_id=None, config={})
    return metrics


def train(folder: Path, steps: range, *, loss: float) -> None:
    metrics = logger(folder, step=steps.start - 1)
    for step in steps:
        metrics.record(step, {"source": torch.tensor(loss)}, {})
        metrics.flush(num_steps=10, take_timings=list)
    metrics.close()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """The points as TensorBoard itself would show them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "stage1"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_curves_go_on_without_a_point_twice(tmp_path: Path):
    train(tmp_path, range(1, 6), loss=1.0)
    train(tmp_path, range(4, 8), loss=2.0)  # from the checkpoint of step 3
    expected = [*((step, 1.0) for step in (1, 2, 3)), *((step, 2.0) for step in (4, 5, 6, 7))]
    assert curve(tmp_path, "loss/source") == expected
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["loss/source"]) for entry in entries] == expected
    logger(tmp_path, step=7).write({"stage": "stage1", "step": 7, "final/miou": 50.0, "slow_rank_host": "a"})
    assert curve(tmp_path, "final/miou") == [(7, 50.0)] and curve(tmp_path, "loss/source") == expected


def test_a_missing_package_is_one_line_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    train(tmp_path, range(1, 4), loss=1.0)
    (said,) = capfd.readouterr().err.splitlines()
    assert "pip install 'iccld[tensorboard]'" in said and "training go on without it" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_link_in_its_place_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "tensorboard").symlink_to("/nowhere")
    train(tmp_path, range(1, 4), loss=1.0)
    (said,) = capfd.readouterr().err.splitlines()
    assert "is a link to /nowhere" in said


def test_a_full_disk_is_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=150, check=True
    )
    assert "trained" in done.stdout
    assert done.stderr.count("tensorboard: it ended (") == 1 and done.stderr.count("\n") == 1, done.stderr


def test_nothing_is_written_unless_it_is_asked_for(tmp_path: Path):
    config = MetricsConfig(loggers=[Logger.jsonl])
    metrics = MetricsLogger(tmp_path, config, stage="stage1", ranks=Ranks(), layout=BatchLayout(4, 4))
    metrics.start(step=0, logger_id=None, config={})
    metrics.write({"stage": "stage1", "step": 1, "loss": 1.0})
    metrics.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert not config.with_wandb and MetricsConfig().with_wandb
    TensorBoardRun().finish()
    with pytest.raises(ValueError, match=r"metrics.loggers=\[wandb\] must hold jsonl.*use \[jsonl,wandb\]"):
        MetricsConfig(loggers=[Logger.wandb])
