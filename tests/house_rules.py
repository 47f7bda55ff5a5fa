"""The house rules that a machine can read: imports, owners of packages, sizes, prose, and a few that always hold.

Every rule is a function from one file to the lines that break it; a finding names file, line and rule.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40

LEAVES = {
    *("labels", "rng", "plain_yaml", "schema", "ranges", "texts", "outcome", "reading", "redact", "node", "graph"),
    *("batch_layout", "eager", "extras", "solver", "strides", "tables"),
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
    "schema": set(),
    "settings": {"runtime.settings"},
    "solver": set(),
    "strides": set(),
    "tables": set(),
    "group_files": set(),
    "plain_hydra": {"group_files"},
    "texts": set(),
    "outcome": set(),
    "extras": set(),
    "suggestions": set(),
    "eager": set(),
    "explained": set(),
    "diffusion": set(),
    "losses": set(),
    "uda": set(),
    "models": {"diffusion", "durable", "schema"},
    "data": {"labels", "durable"},
    "runtime": {"durable"},
    "slurm": {"durable"},
    "demo": {"labels", "durable", "data"},
    "stages": {"models", "diffusion", "losses", "uda", "settings"},
    "trainer": {"runtime", "stages.base", "settings"},
    "scores": {"labels"},
    "evaluation": {"labels", "scores", "settings"},
    "diagnostics": {"labels", "scores", "settings", "evaluation", "diffusion", "losses", "models"},
    "inference": {"durable", "data.images", "evaluation", "models", "settings", "stages.settings", "stages.table"},
    "config": EVERYTHING,
    "programs": EVERYTHING,
    "__main__": EVERYTHING,
    "cli": EVERYTHING,
}
"""Imports of `iccld` that each room (a module or package directly in it) may have, besides itself and the leaves."""

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
        "settings": set(),
        "ranks": set(),
        "tensors": set(),
        "batches": set(),
        "measure": {"settings", "ranks", "tensors", "batches"},
        "faults": {"settings", "ranks", "measure"},
        "checkpoint": {"settings", "ranks", "faults"},
        "engine": {"settings", "ranks", "tensors", "batches", "checkpoint"},
    },
    "programs": {
        "arguments": set(),
        "stopped": set(),
        "run": set(),
        "ablate": {"arguments", "run", "evaluate", "submit"},
        "checkpoint_command": {"checkpoint"},
        "doctor": {"arguments", "run", "train"},
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
    "hydra": {"config.py", "plain_hydra.py", "programs/train/multirun.py"},
    "omegaconf": {"config.py", "plain_hydra.py", "programs/train/multirun.py"},
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
    "huggingface_hub": {"inference/model.py", "inference/source.py", "models/backbone.py"},
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


NO_BEGINNING = re.compile(
    r"(Also|Around|As|At|By|For|From|How|If|In|Is|Its?|None|Of|On|So|That|To|What(ever)?|When|Where|Whether|Which|While|"
    r"Who(ever)?|Whose|Why|With(in|out)?)\b"
)
"""Words that a docstring does not begin with: such a sentence does not stand alone. It begins with a verb or a noun."""


def docstrings_begin_with_a_verb_or_a_noun(source: Source) -> Iterator[Finding]:
    """Docstrings, and the strings below constants and fields."""
    for node in ast.walk(source.tree):
        text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else ""
        if begins := NO_BEGINNING.match(str(text).strip()):
            yield node.lineno, f"a docstring begins with {begins[1]!r}; begin with a verb or a noun"


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
    ("models/saved_model.py", "save_file"),  # to the name of `replacing_by_name`
    ("runtime/measure/memory.py", "torch.cuda.memory._dump_snapshot"),
    ("runtime/measure/host_memory.py", "Path('/proc/self/clear_refs').write_text"),  # the kernel's
    ("slurm/snapshot.py", "shutil.copyfile"),  # into a folder of `scratch_folder`
}
"""The calls that write, or delete whole folders, outside `iccld/durable.py`, each into what that file has made."""


def only_durable_writes_and_deletes(source: Source) -> Iterator[Finding]:
    """Let no link be followed: see `iccld/durable.py`. Deleting, renaming and "x" act on a link itself."""
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
    docstrings_begin_with_a_verb_or_a_noun,
]
