"""Work of a submission's jobs: one job that goes on by itself, a chain, or an array of runs."""

import argparse
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from iccld.config import Config, config_from, layout_of, load_config, trainer_settings
from iccld.programs.arguments import parse_verb, settings_of
from iccld.programs.evaluate import command as evaluate
from iccld.programs.profile import command as profile
from iccld.programs.train import command as train
from iccld.redact import holds_secret
from iccld.schema import key_of
from iccld.slurm.config import Variant, Work
from iccld.slurm.engine_file import ENGINE_FILES, engine_path, engine_variables
from iccld.slurm.snapshot import PACKAGE, code_hash

VERBS: dict[str, Any] = {"train": train, "profile": profile, "evaluate": evaluate}
GRACE = "preemption.grace_s"
Element = tuple[str, list[str]]


def divided(command: Sequence[str], variants: Sequence[Sequence[str]]) -> tuple[list[str], list[Element]]:
    """Return the command and the variants, each a name and its settings.

    The parser takes a verb that follows the last variant, and all behind it, for more of its settings.
    """
    words = list(command[1:] if command[:1] == ["--"] else command)
    given = [list(variant) for variant in variants]
    if not words and given and (verb := next((word for word in given[-1][1:] if word in VERBS), "")):
        place = given[-1].index(verb, 1)
        given[-1], words = given[-1][:place], given[-1][place:]
    return words, [(name, settings) for name, *settings in given]


def run_dir_of(command: Sequence[str]) -> Path:
    """Return the run that `train`, `profile` or `evaluate` works on. Raises ValueError for settings that it would
    refuse.
    """
    if not command or command[0] not in VERBS:
        raise ValueError(
            f"{(command or [''])[0]!r} cannot be submitted; end with `train key=value ...`, `profile key=value ...` or "
            f"`evaluate RUN_DIR ...`."
        )
    if command[0] == "train" and _parse(command).multirun:
        raise ValueError(
            "train --multirun is not submitted; use --variant or --seeds of submit, or, without submit, "
            "`iccld train --multirun hydra/launcher=submitit_slurm ...`."
        )
    if command[0] != "evaluate":
        return Path(_config(command).run_dir).absolute()
    arguments = _parse(command)
    words = settings_of(arguments)
    run_dir = Path(arguments.run_dir)
    if (run_dir / "config.yaml").exists():
        from iccld.programs.evaluate.evaluate import saved_settings  # needs torch, which the other verbs do without

        saved_settings(run_dir, words)
    else:  # missing so far: an earlier job of the chain makes it
        config_from({}, where="evaluate", overrides=words)
    return run_dir.absolute()


def with_grace(command: Sequence[str], lead_s: int) -> list[str]:
    """Return the command; `train` ends before SLURM's own end, unless it says itself when. Raises ValueError."""
    if command[0] != "train" or any(key_of(word) == GRACE for word in command):
        return list(command)
    grace_s, debounce_s = max(lead_s - 30, lead_s // 2), _config(command).preemption.debounce_s
    if grace_s <= debounce_s:
        raise ValueError(
            f"lead_s={lead_s} leaves {grace_s} s for a save, which must be more than "
            f"preemption.debounce_s={debounce_s:g}; use --lead-s {2 * int(debounce_s + 1)} at least."
        )
    return [*command, f"{GRACE}={grace_s}"]


def _parse(command: Sequence[str]) -> argparse.Namespace:
    return parse_verb(command[0], VERBS[command[0]], command[1:])


def _config(command: Sequence[str]) -> Config:
    arguments = _parse(command)
    return load_config(settings_of(arguments), config_dir=arguments.config_dir)


def jobs_of(
    command: Sequence[str],
    *,
    num_ranks: int,
    engine: str = "ddp",
    chain: bool = False,
    seeds: str = "",
    variants: Sequence[tuple[str, list[str]]] = (),
) -> list[tuple[str, Work]]:
    """Return each job's suffix of the name, and its work; each waits for the one before it. Raises ValueError."""
    run_dir, path = run_dir_of(command), engine_path(engine)
    code = run_dir / "code" / code_hash()
    work = Work(
        run_dir=str(run_dir),
        code=str(code),
        folder=str(Path.cwd()),
        variables=engine_variables(path),
        engine_file=str(
            code / PACKAGE.name / ENGINE_FILES.name / path.name if path.parent == ENGINE_FILES else path.absolute()
        ),
    )
    elements = list(_elements(seeds, variants))
    names = [name for name, _ in elements]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"--seeds and --variant name {twice} twice, and two jobs cannot train one run; give it once.")
    if command[0] != "train" and (chain or elements):
        raise ValueError("--chain, --seeds and --variant are of `train`; scoring and profiling are one job.")
    jobs = []
    for suffix, words in _chain(command) if chain else [("", list(command))]:
        of_elements = tuple(_variant(element, words, run_dir) for element in elements)
        for arguments in [variant.arguments for variant in of_elements] or [words]:
            _check_ranks(arguments, num_ranks, work.variables)
        jobs.append((suffix, replace(work, arguments=tuple(words), variants=of_elements)))
    return jobs


def hide_secrets(name: str, work: Work) -> tuple[Work, dict[Path, list[str]]]:
    """Return the job's work with its secret settings in files, and what each of these files is to hold.

    A job script is read by others, and so is a command line; the files belong to the user alone. A file's name depends
    on what it holds: a later submission leaves a waiting job its own.
    """
    files: dict[Path, list[str]] = {}

    def shown(words: Sequence[str], suffix: str = "") -> tuple[str, ...]:
        hidden = _hidden(words)
        if not hidden:
            return tuple(words)
        path = Path(work.run_dir) / "slurm" / f"{name}{suffix}-{_digest(hidden)}.secrets"
        files[path] = hidden
        return *(word for word in words if word not in hidden), f"--secrets={path}"

    variants = tuple(
        replace(variant, arguments=shown(variant.arguments, f"-{Path(variant.run_dir).name}"))
        for variant in work.variants
    )
    return replace(work, arguments=shown(work.arguments), variants=variants), files


def _hidden(words: Sequence[str]) -> list[str]:
    """Return the secret settings, and the settings above and below them that override them or are overridden.

    The content of a file comes before the other words, so all of these go there, in their order.
    """
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    hidden = [word for word in settings if holds_secret(word)]
    count = 0
    while len(hidden) > count:
        count = len(hidden)
        hidden = [word for word in settings if any(_related(key_of(word), key_of(other)) for other in hidden)]
    return hidden


def _related(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _digest(words: Sequence[str]) -> str:
    """Hash slowly: others see the result, and must not find a password by trying."""
    return hashlib.scrypt("\n".join(words).encode(), salt=b"iccld", n=1 << 14, r=8, p=1, dklen=6).hex()


def _check_ranks(command: Sequence[str], num_ranks: int, variables: Mapping[str, str]) -> None:
    """Check, before the job waits, that ranks can share the batch, and that the engine's precision is the run's."""
    if command[0] != "evaluate":
        config = _config(command)
        config.engine.refuse_other_precision(variables.get("ACCELERATE_MIXED_PRECISION", ""))
        for name in config.stages:
            layout_of(name, config, world_size=num_ranks)


def _chain(command: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield a job for each stage, then one that finds them finished and scores them."""
    config = _config(command)
    for name in config.stages:
        settings = [f"stages=[{name}]"]
        if not trainer_settings(name, config).evaluate_every:
            settings.append("data.validation.shards=")  # scoring is the last job's
        yield f"-{name}", _with_settings(command, settings)
    yield "-scores", list(command)


def _elements(seeds: str, variants: Iterable[tuple[str, list[str]]]) -> Iterator[Element]:
    """Yield every variant with every seed."""
    if seeds and not re.fullmatch(r"[1-9]\d*|\d+(,\d+)+", seeds):
        raise ValueError(f"--seeds {seeds} must be how many, as in 3, or which, as in 0,5,7.")
    numbers = seeds.split(",") if "," in seeds else [str(seed) for seed in range(int(seeds or 0))]
    of_seeds = [(f"seed_{seed}", [f"seed={seed}"]) for seed in numbers]
    named = list(variants)
    for name, settings in named:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise ValueError(f"--variant {name!r} names a folder: letters, digits and ._+- only.")
        if wrong := [setting for setting in settings if "=" not in setting]:
            raise ValueError(f"--variant {name}: {wrong[0]!r} must be key=value.")
    if of_seeds and named:
        for (name, settings), (seed, of_seed) in itertools.product(named, of_seeds):
            yield f"{name}_{seed}", [*settings, *of_seed]
    else:
        yield from named or of_seeds


def _variant(element: Element, words: Sequence[str], run_dir: Path) -> Variant:
    name, settings = element
    own = run_dir / name
    return Variant(str(own), tuple(_with_settings(words, [*settings, f"run_dir={own}"])))


def _with_settings(words: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Return `train` with the settings last, in place of earlier ones of the same name."""
    arguments, names = _parse(words), {key_of(setting) for setting in settings}
    kept = [word for word in arguments.overrides if key_of(word) not in names]
    options = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    options += [f"--secrets={path}" for path in arguments.secrets]
    options += ["--extend"] if arguments.extend else []
    return ["train", *options, *kept, *settings]
