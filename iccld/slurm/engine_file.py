"""What accelerate's launcher would make of a file of accelerate_configs/, for ranks that it does not start."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "accelerate_configs"


def engine_path(engine: str) -> Path:
    """The file of an engine: `zero2` is accelerate_configs/zero2.yaml; a path is itself. Raises ValueError."""
    path = Path(engine) if engine.endswith((".yaml", ".yml")) else FOLDER / f"{engine}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml"))) or "none is installed"
        raise ValueError(f"engine={engine}: there is no {path}; use one of {known}, or the path of a YAML file.")
    return path


def engine_variables(path: Path) -> dict[str, str]:
    """The environment of each rank. Raises ValueError for a file that is none of accelerate's."""
    settings = yaml.safe_load(path.read_text())
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ValueError(f"{path} is no file of accelerate's (no distributed_type); use one of accelerate_configs/.")
    kind = settings["distributed_type"]
    variables = {}
    if precision := settings.get("mixed_precision"):
        variables["ACCELERATE_MIXED_PRECISION"] = _word(precision)
    if kind == "FSDP":
        variables["ACCELERATE_USE_FSDP"] = "true"
        variables |= {name.upper(): _word(value) for name, value in settings.get("fsdp_config", {}).items()}
    elif kind == "DEEPSPEED":
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = _word(settings.get("deepspeed_config", {}).get("zero_stage"))
    return variables


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
