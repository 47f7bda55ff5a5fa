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
