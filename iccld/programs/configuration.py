"""`iccld config`: all settings with their meaning, or the meaning of one setting or section."""

import argparse
import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from iccld.programs.arguments import add_settings

if TYPE_CHECKING:
    from iccld.config import Config

DESCRIPTION = """\
Show the settings of a run, each with its meaning; or the type, default and meaning of one setting or section.

  iccld config experiment=gta5_to_cityscapes
  iccld config --help-of stage2.objective
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `iccld config`."""
    add_settings(parser)
    parser.add_argument("--help-of", default="", metavar="KEY", help="explain one setting or section, as stage2.cache")


def run(arguments: argparse.Namespace) -> None:
    """Print settings or explanations. Raises ValueError for settings that do not fit."""
    from iccld.config import Config, load_config

    if arguments.help_of:
        print("\n".join(help_of(arguments.help_of, Config())))
    else:
        print(commented(load_config(arguments.overrides, config_dir=arguments.config_dir)), end="")


def help_of(key: str, config: "Config") -> Iterator[str]:
    """Yield the lines that explain a setting, or a section with all that is below it. Raises ValueError."""
    from iccld.explained import about, sections, settings_in

    *path, name = key.split(".")
    known = dict(sections(config))
    for section, part in known.items():
        if section == key or section.startswith(f"{key}."):
            yield from ["", f"{section}: {about(part)}" if about(part) else f"{section}:"]
            for setting in settings_in(part):
                yield from _lines(section, setting)
            name = ""
    if name:
        found = [setting for setting in settings_in(known.get(".".join(path), config)) if setting.name == name]
        if not found or (path and ".".join(path) not in known):
            raise ValueError(f"--help-of {key}: there is no such setting; `iccld config` shows all settings.")
        yield from _lines(".".join(path), found[0])


def _lines(section: str, setting: Any) -> Iterator[str]:
    name = f"{section}.{setting.name}" if section else setting.name
    yield f"  {name} ({setting.type}; default {setting.default or 'empty'})".replace("`", "")
    yield from textwrap.wrap(setting.meaning, 112, initial_indent="      ", subsequent_indent="      ")


def commented(config: "Config") -> str:
    """Return the settings as YAML, the meaning of each as a comment behind it, or above what takes several lines."""
    from iccld.config import to_yaml
    from iccld.explained import sections, settings_in

    meanings = {
        f"{section}.{setting.name}" if section else setting.name: setting.meaning
        for section, part in sections(config)
        for setting in settings_in(part)
    }
    lines, path, written = to_yaml(config).splitlines(), [], []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        found = re.match(r"( *)(\w+):", line)
        key, indent = None, found[1] if found else ""
        if found and len(found[1]) // 2 <= len(path):
            path = [*path[: len(found[1]) // 2], found[2]]
            key = ".".join(path)
        meaning = meanings.get(key or "")
        goes_on = following.startswith((f"{indent} ", f"{indent}- "))
        if meaning and goes_on:
            written.append(f"{indent}# {meaning}")
        written.append(f"{line}  # {meaning}" if meaning and not goes_on else line)
    return "\n".join(written) + "\n"
