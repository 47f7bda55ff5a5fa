"""The runs of `iccld train --multirun`: a word with several values, in Hydra's grammar, gives a run for each.

    iccld train --multirun experiment=demo run_dir=runs/sweep seed=0,1 stage2.objective.learning_rate=1e-4,6e-5

trains runs/sweep/seed_0_learning_rate_0.0001 and three more. A setting that is a text has one value, commas included.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from iccld.config import layout_of, load_config, read_config, swept_values
from iccld.programs.evaluate.evaluate import unscored_stages
from iccld.programs.run.hand_off import is_finished
from iccld.redact import holds_secret
from iccld.schema import key_of

MAX_JOBS = 1000
MAX_NAME = 100
_OF_HYDRA = re.compile(r"[+~]*hydra[./@]")


@dataclass(frozen=True)
class Job:
    """One run: `words` as `train` takes them, without the secret ones; `stages`: those that it trains.

    `stopped_status`: what it ends with if it was stopped, and has saved.
    """

    name: str
    words: tuple[str, ...]
    run_dir: str
    stages: tuple[str, ...]
    stopped_status: int = 0


def words_of_hydra(words: Sequence[str]) -> list[str]:
    """The words that choose and set the launcher: `hydra/launcher=...`, `hydra.launcher.KEY=...`."""
    return [word for word in words if _OF_HYDRA.match(word)]


def jobs_of(words: Sequence[str], *, secret: Sequence[str] = (), config_dir: str = "", num_ranks: int = 1) -> list[Job]:
    """All combinations of the words' values, each checked as `train` would check it. Raises ValueError.

    secret: further words, which the jobs get from a file.
    """
    for word in words:
        if holds_secret(word):
            key = word.partition("=")[0]
            raise ValueError(
                f"{key} holds a secret, which jobs and their files would show; put it into --secrets FILE."
            )
    settings = [word for word in words if not _OF_HYDRA.match(word)]
    swept = {word: values for word in settings if (values := swept_values(word))}
    if not swept:
        raise ValueError("--multirun trains a run for each value of a setting; give one several, as in seed=0,1,2.")
    fixed = [word for word in settings if word not in swept]
    jobs = list(_jobs(fixed, list(swept.values()), secret, config_dir, num_ranks))
    if len({job.name for job in jobs}) < len(jobs):
        raise ValueError(f"{' '.join(swept)} gives a value twice; give each once.")
    return jobs


def _jobs(
    fixed: list[str], swept: list[list[str]], secret: Sequence[str], config_dir: str, num_ranks: int
) -> Iterator[Job]:
    number = 1
    for values in swept:
        number *= len(values)
    if number > MAX_JOBS:
        raise ValueError(f"--multirun would train {number} runs, and at most {MAX_JOBS} are; give fewer values.")
    top = ""
    for chosen in product(*swept):
        config = load_config([*secret, *fixed, *chosen], config_dir=config_dir)
        top = top or config.run_dir
        if (Path(top) / "config.yaml").exists():
            raise ValueError(f"run_dir={top} holds a run, and is to hold those of --multirun; use another run_dir.")
        for stage in config.stages:
            layout_of(stage, config, world_size=num_ranks)
        name = name_of(chosen)
        run_dir = str(Path(top) / name)
        words = (*(word for word in fixed if key_of(word) != "run_dir"), *chosen, f"run_dir={run_dir}")
        yield Job(name, words, run_dir, tuple(config.stages), config.preemption.exit_status)


def name_of(chosen: Sequence[str]) -> str:
    """The folder of a combination: the last parts of its keys, and its values. It depends on nothing else."""
    keys = [key_of(word) for word in chosen]
    last = [re.split(r"[./]", key)[-1] for key in keys]
    shown = [short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)]
    text = "_".join(f"{key}_{word.partition('=')[2]}" for key, word in zip(shown, chosen, strict=True))
    name = re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_.")
    if name == text and len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}_{hashlib.sha256(' '.join(chosen).encode()).hexdigest()[:8]}"


def unfinished(job: Job) -> list[str]:
    """The stages of a job that are not trained to their end; if all are, the final scoring, if it is owed."""
    run_dir = Path(job.run_dir)
    left = [stage for stage in job.stages if not is_finished(run_dir, stage)]
    if left or not (run_dir / "config.yaml").is_file():
        return left
    config = read_config(run_dir / "config.yaml", [f"run_dir={run_dir}"])
    return ["the final scoring"] if config.data.validation.shards and unscored_stages(config) else []
