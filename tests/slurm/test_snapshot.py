"""The copy of the code that a job runs: whole, the user's own, and of files that nobody else has put there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

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
    "a hard link": lambda copy: os.link(copy / "iccld/cli.py", copy.parent / "elsewhere.py"),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_copy_that_is_not_ones_own_is_refused_and_left(tmp_path: Path, strange: str) -> None:
    STRANGE[strange](copy_code(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is not a copy of this code, and a job would run it"):
        copy_code(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_compiled_elsewhere_is_not_run(tmp_path: Path) -> None:
    copy = copy_code(tmp_path)
    for name in ("cli.cpython-311.pyc", "cli.cpython-311.pyc.140234"):
        plant(copy, f"iccld/__pycache__/{name}")
    assert copy_code(tmp_path) == copy and not list(copy.rglob("*.pyc*"))
