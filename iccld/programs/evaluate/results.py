"""Files of scores, named by model, set and settings, so that no evaluation replaces another one's.

    report/results.json                  the teacher's of the finished stages, by the run's own settings
    report/results_student.json          the student's; results_best.json: the teacher's that scored best in training
    report/results_teacher_camvid_val_x4_1f0e2d3c.json      any other: another model, set, or other settings

The same evaluation again replaces its own file.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from iccld.config import Config, read_config
from iccld.durable import file_checksum
from iccld.models.best_model import best_of
from iccld.models.model_card import WEIGHTS_NAME
from iccld.programs.run.hand_off import final_folder, is_finished
from iccld.reading import MIB, read_json
from iccld.redact import without_secrets
from iccld.stages.settings import InferenceConfig, Weights
from iccld.stages.table import STAGES

OF_NO_CONSEQUENCE = ("models", "batch_size", "diagnostic_images")
"""Facts that may differ between equal evaluations: the weights are known by their checksum."""


def finished_models(config: Config) -> list[Path]:
    """The model folders of the run's finished stages; of `best`, those of the stages that were scored in training."""
    run_dir, weights = Path(config.run_dir), config.inference.weights.value
    if config.inference.weights is Weights.best:  # while a stage trains, its best may yet change
        return [folder for name in STAGES if is_finished(run_dir, name) and (folder := best_of(run_dir / name))]
    return [folder for stage in STAGES if (folder := final_folder(run_dir, stage) / weights).is_dir()]


def about_of(folders: Sequence[Path], config: Config) -> dict[str, Any]:
    """Describe all that the scores depend on: what was scored, and how."""
    return {
        "models": [str(folder) for folder in folders],
        "sha256": [file_checksum(folder / WEIGHTS_NAME) for folder in folders],
        **_settings(config),
    }


def _unusual(inference: InferenceConfig) -> dict[str, Any]:
    """Name how denoising differs from the default, if it does: results of the default keep the names that they had."""
    usual, names = InferenceConfig(), ("solver", "start", "num_averaged", "blend")
    unusual = {name: own for name in names if (own := getattr(inference, name)) != getattr(usual, name)}
    return {name: own.value if isinstance(own, Enum) else own for name, own in unusual.items()}


def _settings(config: Config) -> dict[str, Any]:
    data, inference, classes = config.data.validation, config.inference, config.data.class_set.build()
    also = {name: dataclasses.replace(part, shards=without_secrets(part.shards)) for name, part in data.also.items()}
    validation = dataclasses.replace(data, shards=without_secrets(data.shards), also=also)
    return {
        "data": dataclasses.asdict(validation),
        "class_names": list(classes.names),
        "num_steps": inference.num_steps,
        "noise_seeds": inference.noise_seeds,
        "seed": config.seed,
        "precision": config.engine.precision.name,
        **_unusual(inference),
        **dataclasses.asdict(config.evaluation),
    }


def settings_checksum(config: Config) -> str:
    """Compute a checksum of all settings that scores depend on."""
    return hashlib.sha256(_identity(_settings(config)).encode()).hexdigest()[:16]


def own_results(config: Config) -> Path:
    """Return the file of the run's own models and settings."""
    weights = config.inference.weights
    name = "results.json" if weights is Weights.teacher else f"results_{weights.value}.json"
    return Path(config.run_dir) / "report" / name


def place_for(folders: Sequence[Path], config: Config, about: Mapping[str, Any]) -> Path:
    """Return the file for these scores; a file there of other settings is renamed."""
    own, saved = own_results(config), Path(config.run_dir) / "config.yaml"
    usual = _settings(read_config(saved)) if saved.is_file() else _settings(config)
    is_own = list(folders) == finished_models(config)
    weights = config.inference.weights.value
    if not is_own or _identity(usual) != _identity(_settings(config)):
        return own.with_name(_name(weights if is_own else _label(folders[0]), about))
    if own.exists():
        kept = read_results(own).get("about")
        if not isinstance(kept, Mapping):  # an earlier version did not say what it had scored
            own.rename(_free(own.with_name(f"{own.stem}_before.json")))
        elif not _is_same(kept, about):
            own.rename(own.with_name(_name(weights, kept)))
    return own


def _free(path: Path) -> Path:
    """Return the path, with a number if the name is taken."""
    numbered = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not os.path.lexists(free))


def read_results(path: Path) -> dict[str, Any]:
    """Read the scores by stage, and `about`. Raises ValueError for a file that holds none."""
    try:
        found = read_json(path, 64 * MIB)
    except ValueError as error:
        raise ValueError(f"{path} holds no scores ({error}); remove it, and evaluate again.") from error
    if not isinstance(found, dict) or not all(isinstance(part, dict) for part in found.values()):
        raise ValueError(f"{path} holds no scores; remove it, and evaluate again.")
    return found


def _is_same(kept: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Tell whether the settings are the same; a run's own models may be one more by now."""
    return _identity(kept, "sha256") == _identity(about, "sha256")


def _identity(about: Mapping[str, Any], *beside: str) -> str:
    left_out = (*OF_NO_CONSEQUENCE, *beside)
    return json.dumps({key: value for key, value in about.items() if key not in left_out}, sort_keys=True)


def _name(label: str, about: Mapping[str, Any]) -> str:
    """Make a file name: readable words, and a checksum that makes it unique."""
    data = about.get("data", {})
    words = [label, str(data.get("name") or PurePosixPath(str(data.get("shards", ""))).name)]
    words += [f"x{'-'.join(map(str, about['num_steps']))}"] if about.get("num_steps") else []
    words += ["x".join(map(str, about["image_size"]))] if about.get("image_size") else []
    words += ["windows"] if about.get("sliding_window") else []
    text = re.sub(r"[^A-Za-z0-9.+-]+", "_", "_".join(filter(None, words)))[:100].strip("_.")
    return f"results_{text}_{hashlib.sha256(_identity(about).encode()).hexdigest()[:8]}.json"


def _label(folder: Path) -> str:
    """Return `stage1_student` for a run's model, else the folder's name."""
    parts = folder.absolute().parts
    return f"{parts[-3]}_{parts[-1]}" if len(parts) > 2 and parts[-2] in ("final", "best") else folder.absolute().name
