"""The version has one place, words are spelt well, and the pages make a site without warnings."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import iccld

ROOT = Path(__file__).parent.parent


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_version_has_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "iccld.__version__"}
    assert f"\n## {iccld.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_quick_tests_exist():
    """Check the list in tools/test.sh, of which a file that is renamed would stop all."""
    script = (ROOT / "tools/test.sh").read_text()
    found = script[script.index("quick=(") : script.index(")\n\nlint")] + ")"
    command = ["bash", "-c", f'{found}; for path in "${{quick[@]}}"; do [ -e "$path" ] || echo "$path"; done']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout


def test_what_is_not_released_comes_first():
    titles = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert titles[0] == "## Unreleased"


@needs("codespell_lib")
def test_words_are_spelt_well():
    done = run("codespell_lib")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@needs("mkdocs")
def test_the_pages_make_a_site_without_warnings(tmp_path: Path):
    done = run("mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "settings" / "index.html").is_file()
