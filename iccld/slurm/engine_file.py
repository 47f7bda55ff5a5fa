"""Reading of a file of accelerate_configs/ for ranks that accelerate's launcher does not start."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iccld import plain_yaml

ENGINE_FILES = Path(__file__).resolve().parents[1] / "accelerate_configs"
"""The files, as a checkout links them into the package and a wheel holds them."""

OF_ONE_PROCESS = ("NO", "MULTI_CPU")
"""Kinds by which accelerate's launcher starts a single process, whatever the number that it is given."""
SHARDED = ("FSDP", "DEEPSPEED")
KINDS = (*OF_ONE_PROCESS, "MULTI_GPU", *SHARDED)
PRECISIONS = ("no", "fp16", "bf16", "fp8")


def engine_path(engine: str) -> Path:
    """Return the file of an engine: `zero2` is accelerate_configs/zero2.yaml; a path is itself. Raises ValueError."""
    path = Path(engine) if engine.endswith((".yaml", ".yml")) else ENGINE_FILES / f"{engine}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in ENGINE_FILES.glob("*.yaml"))) or "none is installed"
        raise ValueError(f"engine={engine}: there is no {path}; use one of {known}, or the path of a YAML file.")
    return path


def kind_of(path: Path) -> str:
    """Return the kind of launch that a file asks for, one of KINDS. Raises ValueError for a file of another program."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Return the settings of a file of accelerate's, and its kind. Raises ValueError for any other file."""
    settings = plain_yaml.read_yaml(path, aliases=True)
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ValueError(f"{path} is no file of accelerate's (no distributed_type); use one of accelerate_configs/.")
    kind = settings["distributed_type"] or "NO"  # YAML takes an unquoted NO for false
    return settings, _one_of(path, "distributed_type", kind, KINDS)


def engine_variables(path: Path) -> dict[str, str]:
    """Return the environment of each rank. Raises ValueError for a file that is none of accelerate's."""
    settings, kind = _read(path)
    if (chosen := settings.get("gpu_ids")) not in (None, "all"):
        raise ValueError(f"{path}: gpu_ids={chosen!r} has no effect here; leave it out, and set CUDA_VISIBLE_DEVICES.")
    variables = {}
    if settings.get("use_cpu"):
        variables["ACCELERATE_USE_CPU"] = "true"
    if precision := settings.get("mixed_precision"):
        variables["ACCELERATE_MIXED_PRECISION"] = _one_of(path, "mixed_precision", precision, PRECISIONS)
    if kind == "FSDP":
        variables["ACCELERATE_USE_FSDP"] = "true"
        for name, value in _part(path, settings, "fsdp_config").items():
            if not isinstance(name, str) or not re.fullmatch(r"fsdp_[a-z0-9_]+", name):
                raise ValueError(f"{path}: fsdp_config has {name!r}; its settings are called fsdp_...")
            variables[name.upper()] = _word(path, name, value)
    elif kind == "DEEPSPEED":
        stage = _part(path, settings, "deepspeed_config").get("zero_stage")
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = _one_of(path, "zero_stage", stage, (0, 1, 2, 3))
    return variables


def _part(path: Path, settings: dict[str, Any], name: str) -> dict[Any, Any]:
    part = settings.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{path}: {name}={part!r} must be `key: value` lines.")
    return part


def _one_of(path: Path, name: str, value: Any, choices: Sequence[str | int]) -> str:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{path}: {name}={value!r} must be one of {', '.join(map(str, choices))}.")
    return str(value)


def _word(path: Path, name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float) or not str(value).isprintable():
        raise ValueError(f"{path}: {name}={value!r} must be one word, a number, true or false.")
    return str(value)
