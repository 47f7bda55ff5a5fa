"""Write docs/settings.md: every setting with its type, its default and the line that explains it in the source.

`python tools/scripts/write_settings.py` writes the page. `iccld.explained` reads the explanations.
"""

import textwrap
from pathlib import Path
from typing import Any

from iccld.config import Config
from iccld.data.config import SetConfig
from iccld.explained import about, sections, settings_in
from iccld.slurm.config import SubmitConfig

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

OPENING = """\
# Settings

This page is generated from the source: `python tools/scripts/write_settings.py` writes it again.

Change a setting of a run on the command line by `key=value`, as in `iccld train seed=1 ...`.
`iccld config experiment=NAME` prints the settings of an experiment: the YAML files that it names replace some of the
defaults below. Each table belongs to one part of the settings, and the text above it explains the part.
"""

FURTHER_SETS = """\
The parts `data.source`, `data.target` and `data.validation` take further sets by name:
`+data.source.also={NAME:{shards:FOLDER}}` (the `+` adds a name). Each has the settings below.
"""

SUBMISSION = """\
These are options of `iccld submit`, as in `iccld submit --gpus-per-node 4`, with `-` in place of `_`. A YAML file that
is given by `--settings` holds them by the names below. `requeue: false` is `--no-requeue`. Where they are not given,
`job_name` is the name of the run directory, `lead_s` follows from the saves that were measured, `python` is the
interpreter that submits (unless there is an `image`), and nodes that failed twice are added to `exclude`.
"""


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"{PAGE}: written")


def page() -> str:
    """The text of docs/settings.md."""
    parts = [OPENING]
    for path, part in sections(Config()):
        parts.append(section(f"`{path}`" if path else "The run", part, prefix=f"{path}." if path else ""))
    parts.append(section("Further sets of a domain", SetConfig(), prefix="data.source.also.NAME.", note=FURTHER_SETS))
    parts.append(section("`iccld submit`", SubmitConfig(), prefix="", note=SUBMISSION))
    return "\n".join(parts)


def section(title: str, part: Any, *, prefix: str, note: str = "") -> str:
    """A heading, the docstring of the dataclass, and a table of its fields."""
    rows = [
        f"| `{prefix}{name}` | {kind} | {default} | {cell(meaning)} |"
        for name, kind, default, meaning in settings_in(part)
    ]
    text = textwrap.fill(about(part), 120, break_long_words=False, break_on_hyphens=False)
    table = "\n".join(["| setting | type | default | |", "|---|---|---|---|", *rows])
    return "\n\n".join(text.strip() for text in (f"## {title}", note, text, table) if text) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
