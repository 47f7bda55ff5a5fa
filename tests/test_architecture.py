"""The code keeps the house rules, and a broken rule is found."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.house_rules import RULES, Finding, Source, docstrings_begin_with_a_verb_or_a_noun, files_are_short

ROOT = Path(__file__).parent.parent


@cache
def sources_in(folder: str) -> list[Source]:
    """Read the folder's files once for all rules: a parsed file is kept."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [Source(p.relative_to(ROOT).as_posix(), p.read_text()) for p in files]


def imported_modules(sources: Sequence[Source]) -> dict[str, set[str]]:
    """The modules of `iccld` that each one imports, at any depth: within functions and for type checkers too."""
    names = {".".join(s.parts).removesuffix(".__init__"): s for s in sources if s.parts[0] == "iccld"}

    def module_of(name: str) -> str:
        return name if name in names else name.rpartition(".")[0]

    return {
        name: {module_of(imported) for _, imported in source.imports()} & names.keys() - {name}
        for name, source in names.items()
    }


def in_circles(graph: Mapping[str, set[str]]) -> set[str]:
    """The modules that import themselves, by way of others."""

    def reached(name: str) -> set[str]:
        seen, left = set[str](), [*graph[name]]
        while left:
            if (now := left.pop()) not in seen:
                seen.add(now)
                left += graph[now]
        return seen

    return {name for name in graph if name in reached(name)}


def broken_header(text: str) -> str:
    """Return the words that an experiment's opening comment lacks; "" if it has all."""
    header = re.match(r"(?:[ \t]*(?:#.*)?\n)*", text + "\n")
    opening = header.group().lower() if header else ""
    return ", ".join(word for word in ("command", "cost", "expected") if word not in opening)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule: Callable[[Source], Iterator[Finding]]):
    of_tests = rule in (files_are_short, docstrings_begin_with_a_verb_or_a_noun)
    folders = ["iccld", "launch", "tools", *(["tests"] if of_tests else [])]
    sources = [source for folder in folders for source in sources_in(folder)]
    assert len(sources) > 5, "the checks must see the package"
    findings = [f"{source.path}:{line}: {message}" for source in sources for line, message in rule(source)]
    assert not findings, "\n" + "\n".join(findings)


def test_no_imports_go_in_a_circle():
    graph = imported_modules(sources_in("iccld"))
    assert "iccld.models.decoder" in graph["iccld.models.iccld"], "the test must see imports"
    found = in_circles(graph)
    assert not found, f"{sorted(found)} import each other in a circle"


@pytest.mark.parametrize(
    "text",
    [
        "from iccld.a import f",
        "if TYPE_CHECKING:\n    from iccld.a import f",
        "def g():\n    import iccld.a",
        "from . import a",
        "def g():\n    importlib.import_module('iccld.a')",
    ],
)
def test_a_circle_is_found_wherever_the_import_stands(text: str):
    graph = imported_modules([Source("iccld/a.py", "from iccld.b import g"), Source("iccld/b.py", text)])
    assert in_circles(graph) == {"iccld.a", "iccld.b"}


def test_experiments_open_with_command_cost_and_expected_result():
    files = sorted((ROOT / "iccld/configs/experiment").rglob("*.yaml"))
    findings = [f"{p.relative_to(ROOT)}:1: lacks {lack}" for p in files if (lack := broken_header(p.read_text()))]
    assert files and not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize(
    ("rule", "path", "text", "line", "words"),
    [
        (
            RULES[0],
            "iccld/models/decoder.py",
            "\nfrom iccld.losses import dice",
            2,
            "models must not import iccld.losses",
        ),
        (RULES[0], "iccld/models/decoder.py", "from ..losses import dice", 1, "models must not import iccld.losses"),
        (
            RULES[0],
            "iccld/models/decoder.py",
            "from iccld import stages",
            1,
            "may import ['diffusion', 'durable', 'schema']",
        ),
        (RULES[0], "iccld/trainer.py", "from iccld.stages import segmentation", 1, "'stages.base'"),
        (RULES[0], "iccld/config.py", "def f():\n    import iccld.cli", 2, "config must not import iccld.cli"),
        (RULES[0], "iccld/runtime/engine/engine.py", "import launch.slurm", 1, "must not import launch"),
        (RULES[0], "iccld/extra.py", "", 1, "'extra' is not in the table"),
        (RULES[1], "iccld/uda/classmix.py", "import scipy.ndimage", 1, "uda imports scipy"),
        (RULES[2], "iccld/models/blocks.py", "import xformers.ops", 1, "belongs to ['models/attention.py']"),
        (RULES[2], "iccld/models/blocks.py", "import_module('xformers.ops')", 1, "belongs to ['models/attention.py']"),
        (RULES[2], "iccld/data/images/decode.py", "from torchvision import io", 1, "belongs to no file"),
        (RULES[3], "tools/plot.py", "\n" * 401, 400, "401 lines"),
        (RULES[4], "launch/demo_report.py", "def f():\n" + "    pass\n" * 40, 1, "f has 41 lines"),
        (RULES[5], "iccld/data/utils.py", "", 1, "after what it does"),
        (RULES[6], "tools/export.py", "torch.load(p, weights_only=False)", 1, "without weights_only=True"),
        (RULES[7], "iccld/cli.py", "try:\n    f()\nexcept:\n    pass", 3, "bare except"),
        (
            RULES[8],
            "iccld/trainer.py",
            "'''The teacher.'''\nif stage.name == 'segmentation': pass",
            2,
            "'segmentation'",
        ),
        (RULES[8], "iccld/trainer.py", "stage.teacher.update()", 1, "'teacher'"),
        (RULES[9], "iccld/losses.py", "'''Losses.'''\ndef dice(): pass", 2, "dice without a docstring"),
        (RULES[10], "iccld/trainer.py", "(folder / 'a').write_text('')", 1, "write_text may follow a link"),
        (RULES[10], "iccld/trainer.py", "path.open('ab')", 1, "path.open may follow a link"),
        (RULES[10], "iccld/trainer.py", "os.open(path, os.O_RDWR | os.O_CREAT)", 1, "os.open may follow a link"),
        (
            RULES[11],
            "iccld/data/storage/base.py",
            "from iccld.data.shards import tars",
            1,
            "data.storage must not import",
        ),
        (
            RULES[11],
            "iccld/data/shards/tars.py",
            "from iccld.data.stream import sets",
            1,
            "data.shards must not import",
        ),
        (
            RULES[11],
            "iccld/runtime/measure/flops.py",
            "import iccld.runtime.engine.engine",
            1,
            "must not import iccld.ru",
        ),
        (
            RULES[11],
            "iccld/programs/run/checks.py",
            "from iccld.programs.train import train",
            1,
            "programs.run must not",
        ),
        (RULES[11], "iccld/data/attic/old.py", "", 1, "wing 'attic' is not in the table"),
        (RULES[10], "iccld/data/storage/index.py", "shutil.rmtree(folder)", 1, "shutil.rmtree may follow a link"),
        (RULES[12], "iccld/losses.py", "def dice():\n    '''Of a batch.'''", 2, "begins with 'Of'"),
        (RULES[12], "tools/plot.py", "'''Where, and how.'''", 1, "begins with 'Where'"),
    ],
)
def test_a_broken_rule_is_found_with_its_line(rule, path, text, line, words):
    [(found, message)] = list(rule(Source(path, text)))
    assert found == line and words in message


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "iccld/trainer.py",
            "'''Loop.'''\nfrom iccld.stages.base import Stage\nfrom iccld.runtime.engine.engine import Engine",
        ),
        ("iccld/models/iccld.py", "'''Model.'''\nfrom iccld.models.decoder import Decoder\nfrom iccld import rng"),
        (
            "iccld/config.py",
            "'''Schema.'''\nfrom hydra import compose\nfrom iccld.data.stream.stream import StreamConfig",
        ),
        ("iccld/uda/photometric.py", "'''Colour.'''\nimport kornia\nimport torch"),
        ("iccld/runtime/checkpoint/store.py", "'''Files.'''\ntorch.load(p, weights_only=True)"),
        ("tools/scripts/shards.py", "from iccld.data import shards\nimport webdataset"),
        (
            "iccld/runtime/checkpoint/pieces.py",
            "'''Files.'''\npath.open('rb')\nos.fdopen(number, 'rb')\nnp.load(path, 'r')",
        ),
    ],
)
def test_what_the_rules_allow_is_not_found(path, text):
    source = Source(path, text)
    assert not [finding for rule in RULES for finding in rule(source)]


def test_a_header_without_cost_or_after_the_first_setting_is_found():
    whole = "# @package _global_\n# Command: iccld train\n#\n# Cost: 5 minutes\n# Expected result: 40 mIoU\na: 1\n"
    assert not broken_header(whole)
    assert broken_header(whole.replace("# Cost: 5 minutes\n", "")) == "cost"
    assert broken_header("a: 1\n" + whole) == "command, cost, expected"
