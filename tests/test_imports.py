"""Modules that verbs do not import, so that they start at once."""

import subprocess
import sys

import pytest

SLOW = ("torch", "numpy", "transformers", "kornia", "deepspeed", "wandb", "matplotlib", "sympy", "scipy", "pandas")


@pytest.mark.parametrize(
    ("words", "also"),
    [
        (["--help"], ()),
        (["--version"], ()),
        (["train", "--help"], ()),
        (["launch", "--help"], ()),
        (["shards", "--help"], ("numpy",)),
        (["shards", "info", "nowhere"], ("numpy",)),
        (["goodput", "nowhere"], ()),
        (["submit", "--help"], ()),
        (["checkpoint", "list", "nowhere"], ()),
        (["config", "--help"], ()),
        (["config"], ()),
        (["config", "--help-of", "stage2.objective"], ()),
        (["submit", "--dry-run", "train"], ()),
    ],
    ids=" ".join,
)
def test_a_verb_does_not_import_what_it_does_not_need(words: list[str], also: tuple[str, ...]):
    code = (
        "import sys\nfrom iccld.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit: pass\n"
        f"print([name for name in {SLOW} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str([*also]), done.stderr


def test_settings_are_read_without_torch():
    """Check what reads a saved run's settings: its stages are names."""
    code = "import sys\nfrom iccld.config import config_from\nconfig_from({'stages': ['stage1']}, where='run')\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_training_does_not_import_what_a_step_may_not_need():
    code = "import sys, iccld.programs.train.train\n"
    code += "print([name for name in ('torch._dynamo', *sys.argv[1:]) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *SLOW[2:]], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
