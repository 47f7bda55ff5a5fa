"""The house rules that a machine can read: who imports whom, who owns which package, sizes, and a few that always hold.

Every rule is a function from one file to the lines that break it; a finding names file, line and rule.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40

LEAVES = {
    *("labels", "rng", "plain_yaml", "settings", "ranges", "texts", "outcome", "reading", "redact", "node", "graph"),
    *("batch_layout", "eager", "extras"),
}
"""Rooms that all others may enter: keyed draws, plain files, what a setting may be, and how a command ends."""
PROGRAMS = {"__main__", "cli", "programs"}
EVERYTHING = {"*"}  # but the programs, unless one is asking
MAY_IMPORT = {
    "__init__": {"inference"},  # when ICCLD is asked for: importing a leaf stays cheap
    "configs": set(),  # YAML
    "batch_layout": set(),
    "graph": set(),
    "labels": set(),
    "node": set(),
    "ranges": set(),
    "reading": {"durable"},
    "redact": set(),
    "tracebacks": {"durable"},
    "rng": set(),
    "durable": set(),
    "plain_yaml": set(),
    "settings": set(),
    "group_files": set(),
    "texts": set(),
    "outcome": set(),
    "extras": set(),
    "suggestions": set(),
    "eager": set(),
    "explained": set(),
    "diffusion": set(),
    "losses": set(),
    "uda": set(),
    "models": {"diffusion", "durable"},
    "data": {"labels", "durable"},
    "runtime": {"durable"},
    "slurm": {"durable"},
    "demo": {"labels", "durable", "data"},
    "stages": {"models", "diffusion", "losses", "uda"},
    "trainer": {"runtime", "stages.base"},
    "scores": {"labels"},
    "evaluation": {"labels", "scores"},
    "diagnostics": {"labels", "scores", "evaluation", "diffusion", "losses", "models"},
    "inference": {"durable", "data.images", "evaluation", "models", "stages.predictor"},
    "config": EVERYTHING,
    "programs": EVERYTHING,
    "__main__": EVERYTHING,
    "cli": EVERYTHING,
}
"""What each room (a module or package directly in `iccld`) may import of `iccld`, besides itself and the leaves."""

WINGS: dict[str, dict[str, set[str]]] = {
    "data": {
        "processes": set(),
        "deflate": set(),
        "classes": set(),
        "images": {"deflate"},
        "storage": {"deflate", "classes"},
        "config": {"classes", "storage"},
        "sample": {"classes", "images", "storage"},
        "shards": {"classes", "images", "storage", "sample", "processes"},
        "stream": {"images", "storage", "sample", "processes", "config"},
    },
    "runtime": {
        "ranks": set(),
        "tensors": set(),
        "measure": {"ranks", "tensors"},
        "faults": {"ranks", "measure"},
        "checkpoint": {"ranks", "faults"},
        "engine": {"ranks", "tensors", "checkpoint"},
    },
    "programs": {
        "arguments": set(),
        "stopped": set(),
        "run": {"goodput"},  # a record of a run has its ledger
        "ablate": {"arguments", "run", "evaluate", "goodput", "submit"},
        "checkpoint_command": {"checkpoint"},
        "doctor": {"arguments", "run", "train"},
        "report": {"run", "goodput"},
        "submit": {"arguments", "run", "evaluate", "profile", "train"},
        "train": {"arguments", "stopped", "run", "evaluate"},
        "*": {"arguments", "stopped", "run"},
    },
}
"""The wings of a room (its folders and files), lower ones first: what each may import of the room, besides itself.

Shards and stream do not know each other. A verb knows what verbs share, and of other verbs those that are named.
"""

ONLY_TORCH_AND_NUMPY = {"labels", "rng", "graph", "batch_layout", "ranges", "diffusion", "losses", "uda"}

OWNERS = {
    "xformers": {"models/attention.py"},
    "accelerate": {"programs/launch/local.py", "runtime/engine/engine.py"},
    "deepspeed": {"runtime/engine/zero.py"},
    "tensorboard": {"runtime/measure/tensorboard.py"},
    "wandb": {"runtime/measure/telemetry.py"},
    "transformers": {"models/backbone.py"},
    "hydra": {"config.py", "programs/train/multirun.py"},
    "omegaconf": {"config.py", "programs/train/multirun.py"},
    "kornia": {"uda/photometric.py"},
    "simplejpeg": {"data/images/decode.py"},
    "webdataset": {"data/shards/chunks.py"},
    "fsspec": {"data/storage/remote.py"},
    "aiohttp": {"data/storage/remote.py"},
    "tenacity": {"data/storage/remote.py"},
    "zlib_ng": {"data/deflate.py"},
    "matplotlib": {
        "data/shards/describing.py",
        "programs/ablate/drawing.py",
        "programs/goodput.py",
        "programs/profile/report.py",
    },
    "huggingface_hub": {"inference/model.py", "inference/source.py"},
    "av": {"inference/video.py"},
    "onnx": {"programs/export.py"},
    "onnxruntime": {"programs/export.py"},
    "safetensors": {
        "models/iccld.py",
        "models/saved_model.py",
        "programs/evaluate/averaging.py",
        "runtime/checkpoint/pieces.py",
    },
    "pickle": set(),
    "timm": set(),  # needs torchvision, which has no build for every torch
    "torchvision": set(),
}
"""The files of `iccld` that alone may import a package."""

TASK_WORDS = re.compile(
    r"segmentation|adversarial|stage_?[12]|encoder|denoiser|decoder|discriminator|teacher|classmix|pseudo|"
    r"cityscapes|gta|synthia|camvid|carla|scenes",
    re.IGNORECASE,
)
DOCUMENTED = {"models", "diffusion", "losses", "data", "uda"}
Finding = tuple[int, str]


@dataclass(frozen=True)
class Source:
    """A Python file, by its path relative to the repository's root."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def parts(self) -> tuple[str, ...]:
        return Path(self.path).with_suffix("").parts

    @property
    def room(self) -> str | None:
        """The room of `iccld` that the file is in; None outside."""
        return self.parts[1] if self.parts[0] == "iccld" else None

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of everything imported, at any depth; `from a import b` gives `a.b`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = ".".join(self.parts[: -node.level]) if node.level else ""
                module = ".".join(name for name in (package, node.module) if name)
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def imports_only_what_the_table_allows(source: Source) -> Iterator[Finding]:
    room = source.room
    if room is None:
        return
    if room not in MAY_IMPORT:
        yield 1, f"room {room!r} is not in the table of who may import whom"
        return
    allowed = MAY_IMPORT[room]
    for line, name in source.imports():
        top, _, target = name.partition(".")
        if top in ("launch", "tools"):
            yield line, f"iccld must not import {top}"
        if top != "iccld":
            continue
        fits = any(target == other or target.startswith(f"{other}.") for other in allowed | LEAVES | {room})
        everything = allowed is EVERYTHING and (room in PROGRAMS or target.split(".")[0] not in PROGRAMS)
        if not fits and not everything:
            yield line, f"{room} must not import {name}; it may import {sorted(allowed) or 'nothing'} of iccld"


def wings_import_downwards(source: Source) -> Iterator[Finding]:
    wings = WINGS.get(source.room or "")
    if wings is None or len(source.parts) < 3 or source.parts[2] == "__init__":
        return
    wing = source.parts[2]
    if wing not in wings and "*" not in wings:
        yield 1, f"wing {wing!r} is not in the table of {source.room}'s wings"
        return
    allowed = wings.get(wing, wings.get("*", set())) | {wing}
    for line, name in source.imports():
        parts = name.split(".")
        if parts[:2] == ["iccld", source.room] and len(parts) > 2 and parts[2] not in allowed:
            yield line, f"{source.room}.{wing} must not import {name}; of the room it may import {sorted(allowed)}"


def leaves_import_only_torch_and_numpy(source: Source) -> Iterator[Finding]:
    if source.room not in ONLY_TORCH_AND_NUMPY:
        return
    for line, name in source.imports():
        top = name.split(".")[0]
        owned = source.path.removeprefix("iccld/") in OWNERS.get(top, ())
        if not owned and top not in {"torch", "numpy", "iccld", *sys.stdlib_module_names}:
            yield line, f"{source.room} imports {top}; only torch, numpy and the standard library are allowed"


def packages_stay_with_their_owners(source: Source) -> Iterator[Finding]:
    if source.room is None:
        return
    for line, name in source.imports():
        owners = OWNERS.get(name.split(".")[0])
        if owners is not None and source.path.removeprefix("iccld/") not in owners:
            yield line, f"{name.split('.')[0]} belongs to {sorted(owners) or 'no file'}"


def files_are_short(source: Source) -> Iterator[Finding]:
    count = len(source.text.splitlines())
    if count > MAX_FILE_LINES:
        yield MAX_FILE_LINES, f"{count} lines; {MAX_FILE_LINES} at most"


def functions_are_short(source: Source) -> Iterator[Finding]:
    for function in source.functions():
        count = (function.end_lineno or 0) - function.lineno + 1
        if count > MAX_FUNCTION_LINES:
            yield function.lineno, f"{function.name} has {count} lines; {MAX_FUNCTION_LINES} at most"


def no_utils(source: Source) -> Iterator[Finding]:
    if {"utils", "helpers", "misc"} & set(source.parts):
        yield 1, "name the file after what it does"


def nothing_is_unpickled(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            if not safe:
                yield node.lineno, "torch.load without weights_only=True"


def no_bare_except(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except; name what can be handled"


def the_trainer_knows_no_task(source: Source) -> Iterator[Finding]:
    """Names, attributes, arguments and strings of the trainer; docstrings and comments may explain."""
    if source.room != "trainer":
        return
    prose = {id(node.value) for node in ast.walk(source.tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(source.tree):
        words = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
        if isinstance(node, ast.Constant) and id(node) not in prose:
            words.append(node.value)
        for word in words:
            if isinstance(word, str) and TASK_WORDS.search(word):
                yield getattr(node, "lineno", 1), f"{word!r} is a stage's, a model's or a data set's name"


def public_parts_are_documented(source: Source) -> Iterator[Finding]:
    if source.room is None:
        return
    if not ast.get_docstring(source.tree) and source.text.strip():
        yield 1, "module without a docstring"
    if source.room not in DOCUMENTED:
        return
    for node in source.tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} without a docstring"


WRITERS = re.compile(
    r"(\.(write_text|write_bytes|mkdir|makedirs|rmtree|touch|savefig|export_chrome_trace|_dump_snapshot|open_memmap"
    r"|copyfile|copytree|copy2|move|symlink_to|hardlink_to|mkstemp|NamedTemporaryFile)|^(np|numpy|torch)\.save"
    r"|(^|\.)save_file)$"
)
MAY_WRITE = {
    ("cli.py", "os.open"),  # of the null device
    ("data/shards/chunks.py", "np.save"),  # into memory
    ("data/storage/index.py", "np.save"),  # into a file of `create`
    ("data/shards/indexing.py", "np.save"),
    ("data/shards/records.py", "np.lib.format.open_memmap"),  # over a file of `create`
    ("data/shards/describing.py", "figure.savefig"),  # into a file of `replacing`
    ("programs/ablate/drawing.py", "figure.savefig"),
    ("programs/goodput.py", "figure.savefig"),
    ("programs/run/hand_off.py", "shutil.copyfile"),  # into a folder of `scratch_folder`
    ("programs/profile/report.py", "figure.savefig"),
    ("programs/profile/profile.py", "trace.export_chrome_trace"),  # into a temporary folder
    ("inference/prediction.py", "np.savez_compressed"),  # into a file of `replacing`
    ("inference/video.py", "av.open"),  # into a file of `replacing`
    ("models/iccld.py", "save_file"),  # to the name of `replacing_by_name`
    ("programs/evaluate/averaging.py", "save_file"),
    ("runtime/measure/memory.py", "torch.cuda.memory._dump_snapshot"),
    ("runtime/measure/host_memory.py", "Path('/proc/self/clear_refs').write_text"),  # the kernel's
    ("slurm/snapshot.py", "shutil.copyfile"),  # into a folder of `scratch_folder`
}
"""The calls that write, or delete whole folders, outside `iccld/durable.py`, each into what that file has made."""


def only_durable_writes_and_deletes(source: Source) -> Iterator[Finding]:
    """So that no link is followed: see `iccld/durable.py`. Deleting, renaming and "x" act on a link itself."""
    if source.room in (None, "durable"):
        return
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = [ast.unparse(value) for value in (*node.args, *(keyword.value for keyword in node.keywords))]
        opens = call.split(".")[-1] in ("open", "fdopen") and any(
            re.fullmatch(r"'[rbt]*[wa+][rbt+]*'", word) or re.search(r"O_(WRONLY|RDWR|CREAT)", word) for word in given
        )
        if (opens or WRITERS.search(call)) and (source.path.removeprefix("iccld/"), call) not in MAY_WRITE:
            yield node.lineno, f"{call} may follow a link; write and delete with iccld.durable"


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


RULES = [
    imports_only_what_the_table_allows,
    leaves_import_only_torch_and_numpy,
    packages_stay_with_their_owners,
    files_are_short,
    functions_are_short,
    no_utils,
    nothing_is_unpickled,
    no_bare_except,
    the_trainer_knows_no_task,
    public_parts_are_documented,
    only_durable_writes_and_deletes,
    wings_import_downwards,
]


def broken_header(text: str) -> str:
    """What an experiment's opening comment lines leave out; empty if they say all."""
    header = re.match(r"(?:[ \t]*(?:#.*)?\n)*", text + "\n")
    opening = header.group().lower() if header else ""
    return ", ".join(word for word in ("command", "cost", "expected") if word not in opening)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule: Callable[[Source], Iterator[Finding]]):
    files = sorted(p for folder in ("iccld", "launch", "tools") for p in (ROOT / folder).rglob("*.py"))
    assert len(files) > 5, "the checks must see the package"
    sources = [Source(p.relative_to(ROOT).as_posix(), p.read_text()) for p in files]
    findings = [f"{source.path}:{line}: {message}" for source in sources for line, message in rule(source)]
    assert not findings, "\n" + "\n".join(findings)


def test_no_imports_go_in_a_circle():
    sources = [Source(p.relative_to(ROOT).as_posix(), p.read_text()) for p in (ROOT / "iccld").rglob("*.py")]
    graph = imported_modules(sources)
    assert "iccld.models.blocks" in graph["iccld.models.iccld"], "the test must see imports"
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
        (RULES[0], "iccld/models/decoder.py", "from iccld import stages", 1, "may import ['diffusion', 'durable']"),
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
