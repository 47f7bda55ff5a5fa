"""An error that one rank finds in a check ends all ranks, with one status."""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from iccld.config import Config, config_from
from iccld.outcome import AGAIN, REFUSED, status_of
from iccld.programs.run.checks import claim_run_dir
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
