"""Checks before a run: an error that one rank finds ends all with one status, and attempts leave others alone."""

import errno
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iccld.config import Config, config_from
from iccld.outcome import AGAIN, REFUSED, status_of
from iccld.programs.run.checks import check_settings, claim_run_dir, new_watchdog
from iccld.runtime.faults.heartbeat import heartbeat_path, read_heartbeat
from iccld.runtime.ranks import Ranks, together


@dataclass(frozen=True)
class Two(Ranks):
    """This rank, and what another one found."""

    other: Exception | None = None

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def ending(error: Exception | None, **options: Any) -> BaseException:
    def check() -> None:
        if error:
            raise error

    with pytest.raises((ValueError, OSError, SystemExit)) as raised:
        together(check, Two(**options))
    return raised.value


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a setting"), REFUSED),
        (FileNotFoundError(errno.ENOENT, "no such file", "x"), REFUSED),
        (OSError(errno.EIO, "input/output error", "x"), AGAIN),
        (ConnectionError("gone"), AGAIN),
    ],
)
def test_all_ranks_end_with_the_status_of_what_one_found(error: Exception, status: int):
    found = ending(error, rank=0, other=None)
    assert status_of(found) == status and str(error) in str(found)
    assert status_of(ending(None, rank=0, other=found)) == status
    for own in (error, None):
        silent = ending(own, rank=1, other=found)
        assert isinstance(silent, SystemExit) and silent.code == status


def test_nothing_found_is_nothing():
    together(lambda: None, Two())


@pytest.mark.parametrize("key", ["stage1_from", "initial_model"])
def test_a_folder_is_the_same_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("runs/a", target_is_directory=True)

    def claim(place: str) -> Config:
        words = ["stages=[stage2]", "run_dir=new", f"{key}={place}"]
        claim_run_dir(Path("new"), config := config_from({}, where="test", overrides=words), Ranks())
        return config

    claim("runs/a")
    (tmp_path / "new/stage2").mkdir()
    before = (tmp_path / "new/config.yaml").read_bytes()
    for place in ("./runs/a/", f"{tmp_path}/runs/a", "link"):
        assert getattr(claim(place), key) == "runs/a" and (tmp_path / "new/config.yaml").read_bytes() == before
    with pytest.raises(ValueError, match=f"{key}: runs/a -> runs/b"):
        claim("runs/b")


def test_scores_in_training_need_a_set_to_score_on():
    config = config_from({}, where="test", overrides=["stage2.trainer.evaluate_every=5"])
    engine: Any = SimpleNamespace(ranks=Ranks(), device=torch.device("cpu"), is_sharded=False)
    with pytest.raises(ValueError, match=r"^stage2\.trainer\.evaluate_every is set, but data\.validation\.shards is"):
        check_settings(config, engine)


def test_evaluations_of_one_run_at_a_time_have_heartbeats_of_their_own(tmp_path: Path):
    config, beats_in = replace(Config(), run_dir=str(tmp_path)), tmp_path / "heartbeats/evaluate"
    killed, other = heartbeat_path(beats_in / "1.5_7", 0), beats_in / "notes/text"
    for path in (killed, other):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    for path in (killed, killed.parent, killed.parents[1], other, other.parent):
        os.utime(path, (1.5, 1.5))
    with (
        new_watchdog(config, Ranks(), beats_in=beats_in) as one,
        new_watchdog(config, Ranks(), beats_in=beats_in) as two,
    ):
        beats = [read_heartbeat(of.beats_in, 0) for of in (one, two)]
        assert one.attempt != two.attempt and [beat and beat.attempt for beat in beats] == [one.attempt, two.attempt]
    assert list(beats_in.iterdir()) == [other.parent], "ended and killed attempts leave nothing"


def test_heartbeats_that_another_process_removes_first_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / "rank_00009.json"] * pattern.startswith("rank"))
    new_watchdog(replace(Config(), run_dir=str(tmp_path)), Ranks())
