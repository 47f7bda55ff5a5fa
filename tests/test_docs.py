"""README.md and docs/: links lead somewhere, commands and settings exist, the page of settings is not stale."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template

import pytest

from iccld.cli import parse
from iccld.config import Config, load_config
from iccld.programs.launch.command import split
from iccld.programs.train.sweep import jobs_of
from iccld.schema import fields_of, type_at
from tools.scripts import write_settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS = {path.parent.name for path in (ROOT / "iccld/configs").glob("*/*.yaml")}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"(?:tools|launch|accelerate_configs|tests|results|iccld|docs)/[\w./-]*")
SETTING = re.compile(r"\+{0,2}([a-z_]\w*(?:\.\w+)*)=(.*)", re.DOTALL)
SCRIPTS = re.compile(r"(?:^|/)tools/(?:\w+/)*\w+\.py$")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Command:
    """One command of a block, its variables put in, as words."""

    words: tuple[str, ...]

    def after(self, *names: str) -> list[str] | None:
        """The words after consecutive names; None if they do not occur."""
        for i in range(len(self.words)):
            if self.words[i : i + len(names)] == names:
                return list(self.words[i + len(names) :])
        return None

    def of_iccld(self) -> list[str] | None:
        """The words of the verb, also behind a launcher; None for another program."""
        if self.words[0] == "iccld":
            words = list(self.words[1:])
            return split(parse(words))[2] if words[0] == "launch" else words
        return self.after("--module", "iccld")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    titles = re.findall(r"^#+ +(.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(text: str, folder: Path) -> Iterator[str]:
    for target in LINK.findall(prose(text)):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = (folder / path).resolve() if path else None
        if file is not None and not file.exists():
            yield f"{target}: there is no such file"
        elif anchor and anchor not in slugs(file.read_text() if file else text):
            yield f"{target}: there is no such heading"


def commands(text: str) -> Iterator[Command]:
    """The commands of the shell blocks; in a `console` block, those behind a `$`."""
    variables: dict[str, str] = {}
    for kind, block in FENCE.findall(text):
        if kind == "console":
            block = "\n".join(found[0] for found in re.finditer(r"(?<=^\$ )(?:.*\\\n)*.*", block, re.MULTILINE))
        if kind in ("sh", "console"):
            yield from _commands_of(block, variables)


def _commands_of(block: str, variables: dict[str, str]) -> Iterator[Command]:
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(Template(line).safe_substitute(variables), comments=True)
        while words and re.match(r"[A-Za-z_]\w*=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        start = 0
        for i, word in enumerate([*words, ";"]):
            if word in (";", "&&", "|", "}"):
                if words[start:i]:
                    yield Command(tuple(words[start:i]))
                start = i + 1


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def wrong_paths(text: str) -> Iterator[str]:
    words = [word for command in commands(text) for word in command.words]
    for word in [*words, *code_spans(text)]:
        if OURS.fullmatch(word) and not (ROOT / word).exists():
            yield f"{word}: there is no such file"


def wrong_commands(text: str) -> Iterator[str]:
    """Commands with an unknown verb, option, setting, value or packaged YAML file."""
    overrides: dict[str, str] = {}
    for command in commands(text):
        yield from wrong_options(command)
        try:
            arguments = parse(command.of_iccld() or ["config"])
        except SystemExit:
            yield f"{shlex.join(command.words)}: is refused"
            continue
        if getattr(arguments, "multirun", False):
            jobs_of(["model=tiny", *arguments.overrides])
            continue
        for word in getattr(arguments, "overrides", []):
            group, _, name = word.partition("=")
            if group in GROUPS and name != "..." and not arguments.config_dir:
                yield from [] if (ROOT / f"iccld/configs/{group}/{name}.yaml").exists() else [f"{word}: no such file"]
            elif group not in (*GROUPS, "data.classes") and word != "...":  # a file that the page writes
                overrides[group] = word
    try:
        if overrides:
            load_config(["model=tiny", *overrides.values()])  # once a page, since it takes half a second
    except ValueError as error:
        yield str(error)


def wrong_options(command: Command) -> Iterator[str]:
    if any(SCRIPTS.search(word) for word in command.words):
        script = next(i for i, word in enumerate(command.words) if SCRIPTS.search(word))
        for option in command.words[script + 1 :]:
            if option.startswith("--") and f'"{option}"' not in of_tools():
                yield f"{command.words[script]} {option}: no script of tools/ has this option"


@cache
def of_tools() -> str:
    return "".join(path.read_text() for path in sorted((ROOT / "tools").rglob("*.py")))


def wrong_settings(text: str) -> Iterator[str]:
    """Settings in code spans, in commands and in YAML blocks that the schema does not have."""
    spans = [word for span in code_spans(text) for word in span.split()]
    spans += [word for command in commands(text) for word in command.words if command.of_iccld() is not None]
    for kind, block in FENCE.findall(text):
        spans += re.findall(r"[\w.]+=[\w.]+", block) if kind == "yaml" else []
    for span in spans:
        name = span if re.fullmatch(r"[a-z_]\w*(\.\w+)+", span) else ""
        key = found[1] if (found := SETTING.fullmatch(span)) else name
        if key.startswith("hydra."):  # a launcher's
            continue
        is_file = not found and key.endswith((".py", ".json", ".png", ".yaml", ".jsonl", ".md", ".txt", ".safetensors"))
        if not key or is_file or span == "key=value" or (not found and key.split(".")[0] not in fields_of(Config)):
            continue
        if type_at(Config, key) is None and key not in GROUPS:
            yield f"{span}: there is no such setting"


def long_lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if len(line) > 120 and not line.startswith("|"))


CHECKS = [wrong_paths, wrong_commands, wrong_settings, long_lines]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@each_page
def test_links_lead_to_files_and_headings(page: Path):
    assert not list(broken_links(page.read_text(), page.parent))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@each_page
def test_what_a_page_names_exists(page: Path, check):
    assert not list(check(page.read_text()))


def test_every_page_is_reachable_from_the_readme():
    reached, left = set(), [README]
    while left:
        page = left.pop()
        if page not in reached:
            reached.add(page)
            targets = [target.partition("#")[0] for target in LINK.findall(prose(page.read_text()))]
            left += [file for target in targets if (file := (page.parent / target).resolve()) in PAGES]
    assert reached == set(PAGES)


def test_the_page_of_settings_is_what_the_source_says():
    assert write_settings.PAGE.read_text() == write_settings.page(), "run `python tools/scripts/write_settings.py`"


def test_the_table_of_events_is_what_the_source_writes():
    source = "".join(path.read_text() for path in sorted((ROOT / "iccld").rglob("*.py")))
    written = set(re.findall(r'(?:\bwrite_event\([^,"]+,|\bmetrics\.event\(|\bself\.event\()\s*"(\w+)"', source))
    table = (ROOT / "docs/training.md").read_text().split("| event | written |")[1].split("\n\n")[0]
    told = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert len(written) > 10 and sorted(told) == sorted(written)


def test_each_setting_has_a_line_with_its_default_and_its_explanation():
    page = write_settings.page()
    assert "| `seed` | int | `0` |" in page
    assert (
        "| `model.latent` | `image`, `mask`, `residual` | `residual` | Readings of z_0: what it is the latent of. |"
        in page
    )
    assert "Create a collection of name/value pairs" not in page, "not the docstring of Enum"
    assert "| `stage2.trainer.gradient_clip` | float | `1.0` | the largest norm of all gradients" in page
    assert "| `evaluation.max_images` | int | `0` | Only samples numbered below this are scored" in page
    assert "| `data.source.weight` | float | `1.0` | its share where" in page, "inherited"
    assert "| `data.source.also.NAME.weight` |" in page and "| `lead_s` | int | `300` |" in page


@pytest.mark.parametrize(
    ("check", "text", "words"),
    [
        (wrong_paths, "see `tools/nothing.py`", "tools/nothing.py"),
        (wrong_paths, "```sh\npython launch/lokal.py 2 train\n```", "launch/lokal.py"),
        (wrong_commands, "```sh\niccld trane seed=1\n```", "trane"),
        (wrong_commands, "```console\n$ iccld shards mend DIR\nno command\n```", "mend"),
        (wrong_commands, "```sh\niccld launch 2 --engine zero2 trane\n```", "trane"),
        (wrong_commands, "```sh\niccld predict a b c --stride 4\n```", "--stride"),
        (wrong_commands, '```sh\nrun="train seeds=1"\niccld config x=1 && iccld $run\n```', "x"),
        (wrong_commands, '```sh\nrun="seed=one"\niccld train $run\n```', "seed"),
        (wrong_commands, "```sh\niccld train experiment=nothing\n```", "nothing"),
        (wrong_commands, "```sh\npython tools/benchmarks/bench_data.py \\\n    --jason f\n```", "--jason"),
        (wrong_settings, "set `stage1.trainer.num_step=3`", "num_step"),
        (wrong_settings, "after `watchdog.steps_s` (600)", "steps_s"),
        (wrong_settings, "```yaml\ncommon: [experiment=demo, seeds=3]\n```", "seeds"),
        (long_lines, "a " * 61, "a a"),
    ],
)
def test_what_is_wrong_is_found(check, text: str, words: str):
    found = list(check(text))
    assert found and words in found[0]


def test_a_link_to_a_missing_file_or_heading_is_found():
    text = "# A title, here\n[a](docs/nothing.md) [b](#a-title-here) [c](#nothing) [d](docs/shards.md#nothing)"
    assert [found.split(":")[0] for found in broken_links(text, ROOT)] == [
        "docs/nothing.md", "#nothing", "docs/shards.md#nothing"
    ]  # fmt: skip
