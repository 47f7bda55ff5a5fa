"""The copy of the code that a job runs: whole, the user's own, and of files that nobody else has put there."""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from iccld.programs.submit import submit, work
from iccld.slurm import snapshot
from iccld.slurm.snapshot import copy_code


def plant(copy: Path, name: str, text: str = "print(1)") -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text(text)


def relink(copy: Path) -> None:
    (copy / "iccld/cli.py").rename(copy.parent / "elsewhere.py")
    (copy / "iccld/cli.py").symlink_to(copy.parent / "elsewhere.py")


STRANGE: dict[str, Callable[[Path], None]] = {
    "changed": lambda copy: plant(copy, "iccld/cli.py"),
    "missing": lambda copy: (copy / "iccld/cli.py").unlink(),
    "more": lambda copy: plant(copy, "usercustomize.py"),
    "a module beside its cache": lambda copy: plant(copy, "__pycache__/os.py"),
    "a link of the same content": relink,
    "endless": lambda copy: os.truncate(copy / "iccld/cli.py", 1 << 40),
    "of another byte": lambda copy: plant(copy, "iccld/cli.py", (copy / "iccld/cli.py").read_text()[:-1] + " "),
    "a folder": lambda copy: (copy / "usercustomize").mkdir(mode=0o311),  # what it holds need not be readable to be run
    "a link to a cache": lambda copy: (copy / "iccld/__pycache__").symlink_to(copy.parent),
    "a hard link": lambda copy: os.link(copy / "iccld/cli.py", copy.parent / "elsewhere.py"),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_copy_that_is_not_ones_own_is_refused_and_left(tmp_path: Path, strange: str) -> None:
    STRANGE[strange](copy_code(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is not of this code, and a job would run it"):
        copy_code(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_compiled_elsewhere_is_not_run(tmp_path: Path) -> None:
    copy = copy_code(tmp_path)
    for name in ("cli.cpython-311.pyc", "cli.cpython-311.pyc.140234", ".nfs0000a1"):
        plant(copy, f"iccld/__pycache__/{name}")
    assert copy_code(tmp_path) == copy and not list(copy.rglob("__pycache__"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of two files, whose code is what is copied."""
    (package := tmp_path / "checkout" / "iccld").mkdir(parents=True)
    for name in ("a.py", "b.py"):
        (package / name).write_text("before")
    monkeypatch.setattr(snapshot, "PACKAGE", package)
    return package


def test_code_that_is_edited_while_it_is_copied_is_not_run(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edited_meanwhile(source: Path, target: Path) -> None:
        (package / "b.py").write_text("after")
        copy(source, target)

    copy = shutil.copyfile
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="submit again"):
        patched.setattr(shutil, "copyfile", edited_meanwhile)
        copy_code(tmp_path / "code")
    assert not [*(tmp_path / "code").iterdir()]
    assert (copy_code(tmp_path / "code") / "iccld" / "b.py").read_text() == "after"


def test_a_job_whose_code_is_edited_before_it_is_copied_is_not_submitted(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script names the state that was there when the settings were read."""

    def edited_after(*given: object, **options: object) -> object:
        jobs = jobs_of(*given, **options)  # type: ignore[arg-type]
        (package / "b.py").write_text("after")
        return jobs

    jobs_of = work.jobs_of
    monkeypatch.setattr(work, "jobs_of", edited_after)
    (sbatch := tmp_path / "sbatch").write_text(f"#!/bin/sh\ntouch {tmp_path}/submitted; echo 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    submit.add_arguments(parser := argparse.ArgumentParser())
    train = ["train", "model=tiny", "dataset=scenes", f"run_dir={tmp_path}/run"]
    with pytest.raises(ValueError, match="submit again"):
        submit.submit_jobs(parser.parse_args(train))
    assert not (tmp_path / "submitted").exists()
